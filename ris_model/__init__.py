"""ris_model: a near-field localisation model behind a reconfigurable intelligent surface.

The rooms, in the order of understanding (each imports only rooms to its left):
config, storage, geometry, cells, channel, linalg, covariance, data, shards, images, network,
losses, metrics, estimate, checkpoint, training, subject, tuning, evaluation, commands.
"""

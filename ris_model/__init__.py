"""ris_model: a near-field localisation model behind a reconfigurable intelligent surface.

The rooms, in the order of understanding (each imports only rooms to its left):
config, geometry, cells, channel, linalg, covariance, data, images, network, losses, training,
subject.
"""

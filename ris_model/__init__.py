"""ris_model: a near-field localisation model behind a reconfigurable intelligent surface.

The rooms, in the order of understanding (each imports only rooms to its left):
config, geometry, channel, linalg, covariance, data, network, losses, subject.
"""

"""Data sets, served as whole batches on the device: generated point clouds, image sets, the user's own files."""

"""What the tests make their datasets with; it ships with the package."""

from diffusion_data.testing import DATASET_YAML, tiny_sample, tiny_samples, write_dataset, write_raw_dataset

__all__ = ["DATASET_YAML", "tiny_sample", "tiny_samples", "write_dataset", "write_raw_dataset"]

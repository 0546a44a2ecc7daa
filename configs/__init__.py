"""The package's Hydra configs: prepare.yaml with recipe/, train.yaml with data/ and model/."""

"""The scripts, importable as diffusion_data.scripts: train.py with its model, and small tools."""

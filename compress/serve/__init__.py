"""From a checkpoint to a server: commands of engines, files for Docker and Triton, the model card."""

"""The embedded default: a small trained DDPM, images, feature network and statistics, and how they are made."""

"""One file per backend, named as on the command line; each has `open_denoiser(directory, *, threads, device)`."""

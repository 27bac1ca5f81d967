"""One file per backend, named as on the command line.

Each has `open_denoiser(directory, *, threads, device)` and says in RUNS_EXPORTED whether it takes exported directories,
then also with `failed=True`, for `dpctl verify`; what runs weights takes a `precision` instead. One whose outputs are
near the model's own but not equal to them says EXACT = False.
Where it has a profiler: `profile(directory, *, threads, device, batch_size, runs)`, a tuple of LayerTime; with a
`precision` as well where it runs weights.
"""

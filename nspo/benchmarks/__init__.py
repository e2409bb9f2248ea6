"""Named benchmarks on any model folder: `registry` lists them, `run` is the command `nspo evaluate`."""

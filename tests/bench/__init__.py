"""The benchmarks: Loraplex and bare vLLM, with the same model, settings, client and load, in the same run."""

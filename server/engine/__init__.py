"""All of this process that imports vLLM."""

import os

# vLLM reads it where it makes its models of requests; 4 without it, which is OpenAI's and not Anthropic's.
MAX_STOPS = 64
os.environ.setdefault("VLLM_MAX_STOP_STRINGS", str(MAX_STOPS))

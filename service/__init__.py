"""The HTTP service: durable jobs, an OpenAI-compatible API, and engines that generate."""

"""The HTTP server: OpenAI's endpoints, intrinsics as functions, and the playground."""

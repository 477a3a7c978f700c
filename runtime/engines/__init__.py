"""Loading a TensorRT engine and running batches on it, for the backends of both products."""

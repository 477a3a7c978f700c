"""Build-time tools: checkpoint to ONNX, lowered models, engines and bundles."""

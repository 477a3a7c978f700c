"""The custom op of this name: definition, ONNX function, later kernel and plugin."""

"""ONNX models: an encoder with its classifier as a graph that onnxruntime and OpenVINO run without this library."""

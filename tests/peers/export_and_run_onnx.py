"""STATE.pt SOURCE OUT: export to ONNX with int8 and print the differences, where onnx and onnxruntime are
installed."""

import json
import sys

import torch

from megam3.export.onnx import export_onnx

state = torch.load(sys.argv[1], weights_only=True)
print(json.dumps(export_onnx(state, sys.argv[2], sys.argv[3], int8=True)))

"""The drop-in, a model that you already have, and the deployed form, side by side.

Run: python examples/quickstart.py
"""

import torch

import resnet_fast

x = torch.randn(2, 3, 224, 224)

# 1. The drop-in: torchvision's name, arguments and state_dict. weights="DEFAULT" would load the pretrained ones.
model = resnet_fast.resnet50(num_classes=10).eval()
with torch.inference_mode():
    logits = model(x)

# 2. Any conv + batch norm model, in place; its class, keys, parameters and hooks stay.
yours = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
    torch.nn.BatchNorm2d(16),
    torch.nn.ReLU(),
).eval()
resnet_fast.accelerate(yours)
with torch.inference_mode():
    features = yours(x)

# 3. The whole network as one schedule: a snapshot of the weights, to deploy.
run = resnet_fast.plan(model, x)
print("plan agrees with the model:", torch.allclose(run(x), logits, rtol=1e-3, atol=1e-4))

# Which kernel runs each layer, and why.
print(resnet_fast.explain(model, x))

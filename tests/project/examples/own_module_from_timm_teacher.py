# One's own torch module learns from a network of timm: here a small one without published weights.
import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import kd

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
data = TensorDataset(images, torch.tensor(digits.target))
train, validation = (DataLoader(part, 64, shuffle=True) for part in random_split(data, [0.8, 0.2]))
teacher = timm.create_model("test_resnet", in_chans=1, num_classes=10)  # pretrained=True loads more
kd.distill(teacher, None, train, epochs=2)
student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
result = kd.distill(student, teacher, train, validation=validation, epochs=3)
print(f"{result.accuracy:.1%} on validation images")

# A loss of one's own beside those that there are: the angle between the two networks' logits.
import torch
from sklearn.datasets import load_digits

import kd

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
train = torch.utils.data.TensorDataset(images, torch.tensor(digits.target))
train = torch.utils.data.DataLoader(train, 64, shuffle=True)


def angle(student_logits, teacher_logits, labels):
    return 1 - torch.cosine_similarity(student_logits, teacher_logits).mean()


teacher, student = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)) for _ in "12")
kd.distill(teacher, None, train, epochs=1)
result = kd.distill(student, teacher, train, loss="ce:1", extra_losses={"angle": angle}, epochs=1)
print(result.history[-1].losses)

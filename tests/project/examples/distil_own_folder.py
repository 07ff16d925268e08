# The folder photos/, with one folder of images per class, becomes two images per class.
import numpy as np
from PIL import Image

import dsdistill

data = dsdistill.load_data("photos", image_size=16)
small = dsdistill.kip(*data.train, classes=data.classes, images_per_class=2, steps=50)
scores = small.predictor()(data.test[0])
print(f"{(scores.argmax(1) == data.test[1]).mean():.0%} of the test images are right")
small.save("distilled.safetensors")
pixels = (np.vstack(small.as_pixels()) * 255).astype(np.uint8)
Image.fromarray(pixels.squeeze()).save("distilled.png")

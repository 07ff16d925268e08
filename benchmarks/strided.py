"""Small convolutional networks for measurements on a CPU: `--student 'strided:network(width=8)'`.

Three convolutions with stride 2 and batch norm: a tenth of the time of the built-in convnet.
"""

from torch import nn


def network(width: int = 8, in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    """Convolutions of one, two and four times the width, the mean over positions, a linear layer.

    Args:
        width: Channels of the first convolution.
        in_channels: Channels of an image.
        num_classes: Number of classes.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for each in (width, 2 * width, 4 * width):
        convolution = nn.Conv2d(channels, each, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(each), nn.ReLU()]
        channels = each
    head = nn.Linear(channels, num_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

"""The function that a network starts as, kept to be subtracted from what it becomes.

A network of random weights is a random function of the images, and of a large one in the NTK
parameterisation that function is several times larger than the labels. Training on few images
replaces it only where these say something; elsewhere it stays, as noise on every test image.
Predicting f(x; theta) - f(x; theta_0) removes it: the prediction is 0 before the first step, and in
the limit of infinite width it becomes kernel regression with the network's NTK.

Source: Chizat, Oyallon and Bach (2019), arXiv:1812.07956; networks on distilled sets are so trained
by Loo et al. (2022), arXiv:2210.12067.
"""

import copy

from torch import Tensor, nn


class InitialFunction(nn.Module):
    """A frozen copy of a network as it is at this moment, always in evaluation mode.

    Its weights take no gradient; gradients with respect to the images pass through it, so that
    those of the difference are exact. Dropout is off, and batch norm uses the statistics stored at
    this moment, so that the copy stays one fixed function of an image. The difference is then
    exactly 0 at the start in evaluation mode, and in training mode for networks without dropout
    and batch norm. With batch norm the trained network is normalised by its batch and later by its
    averages, and the copy of a fresh network by 0 and 1: another function from the first step on,
    which the training must remove itself. Such networks gain nothing, unless they are pretrained.

    Attributes:
        network: The copy.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "InitialFunction":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> object:
        return self.network(images)

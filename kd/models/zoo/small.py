"""Known architectures as the field uses them on small images: ResNet-18, VGG-11, a small ViT.

Published papers compare distilled sets on these, of images of 28 to 64 pixels; the originals are
made for 224. Built from the parts of timm and torchvision, with initial weights as noted.
"""

from functools import partial
from math import ceil
from typing import Any

from torch import nn

from dsdistill.harness.errors import UserError
from kd.models.zoo.protocol import Shape

VIT_HEADS = 3  # they divide the width
VIT_PATCHES_PER_SIDE = 8  # at most


def resnet18(shape: Shape, classes: int, width: int) -> nn.Module:
    """timm's ResNet-18 with a stem of one 3x3 convolution of stride 1, and no max pooling.

    Stages of w, 2w, 4w and 8w channels, at strides 1, 2, 4 and 8; the last map of 32x32 images is
    4x4. Initial weights are timm's: He-normal by fan-out, and every residual branch starts at 0.

    Args:
        width: w, channels of the stem and of the first stage; 64 is ResNet-18.

    Source: He et al. (2016), arXiv:1512.03385; the stem is that of its CIFAR networks.
    """
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock  # timm annotates an instance where it takes the class
    channels = (width, 2 * width, 4 * width, 8 * width)
    network: Any = ResNet(block, (2, 2, 2, 2), classes, in_chans=shape[2], channels=channels)
    network.conv1 = nn.Conv2d(shape[2], width, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    if width != 64:  # timm's stem has 64 channels for every width of the stages
        network.bn1 = nn.BatchNorm2d(width)
        network.layer1[0] = block(width, width)
    network.init_weights()
    return network


def vgg11(shape: Shape, classes: int, width: int) -> nn.Module:
    """torchvision's VGG-11 layers with batch norm, the mean over the map, and one linear layer.

    For images below 32 pixels the last poolings are left out, those that would halve a side of one
    pixel, so that small images are neither enlarged nor padded: 8x8 keeps the first three of five,
    28x28 four. The weights have the same shapes at every size, and PyTorch's default
    initialisation.

    Args:
        width: Channels of the first layer; the others have up to 8 times as many. 64 is VGG-11.

    Source: Simonyan and Zisserman (2015), arXiv:1409.1556, configuration A, whose three linear
    layers become one, as usual on small images.
    """
    from torchvision.models.vgg import cfgs, make_layers

    side, plan = min(shape[:2]), []
    for layer in cfgs["A"]:
        if isinstance(layer, int):
            plan.append(layer * width // 64)
        elif side > 1:
            plan.append(layer)
            side //= 2
    features = make_layers(plan, batch_norm=True)
    features[0] = nn.Conv2d(shape[2], width, 3, padding=1)  # torchvision's takes three channels
    return nn.Sequential(
        features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)
    )


def vit(shape: Shape, classes: int, width: int) -> nn.Module:
    """timm's VisionTransformer of depth 6 with 3 heads and up to 8x8 patches.

    The linear layer takes the mean of the patches; there is no class token.

    In an image of side s a patch has ceil(s / 8) pixels per side: 1 at 8x8, 4 at 28x28 and 32x32, 8
    at 64x64. Incomplete last patches of a row or column are padded with zeros.

    Args:
        width: Width of the embedding, a multiple of 3.

    Raises:
        UserError: If the width is not a multiple of the number of heads.

    Source: Dosovitskiy et al. (2021), arXiv:2010.11929; 192 is the width of DeiT-tiny (Touvron et
    al. 2021, arXiv:2012.12877), which has twice the depth. The mean: Beyer, Zhai and Kolesnikov
    (2022), arXiv:2205.01580.
    """
    if width % VIT_HEADS:
        raise UserError(f"the width of small-vit is a multiple of {VIT_HEADS}, got {width}")
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    patch: Any = ceil(shape[0] / VIT_PATCHES_PER_SIDE), ceil(shape[1] / VIT_PATCHES_PER_SIDE)
    padded = ceil(shape[0] / patch[0]) * patch[0], ceil(shape[1] / patch[1]) * patch[1]
    return VisionTransformer(
        padded,
        patch,
        shape[2],
        classes,
        embed_dim=width,
        depth=6,
        num_heads=VIT_HEADS,
        class_token=False,
        global_pool="avg",
        dynamic_img_pad=True,
        # Padded images are smaller than the size that the network is built for.
        embed_layer=partial(PatchEmbed, strict_img_size=False),
    )

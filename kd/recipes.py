"""Recipes by name: frozen values, each with its source, its command, its cost and its result."""

from collections.abc import Mapping
from dataclasses import replace

from dsdistill.harness.errors import unknown_name
from kd.recipe import Recipe

# Learning rates of the first four were chosen on validation splits, one seed, two CPU cores.
# Costs are floating point operations, a multiply-add being two: three forward passes of the student
# and one of the teacher for each image of each epoch, counted by torch; ImageNet has 1.28 million.

# Real images, convnet and mlp. Digits (1295 images, 30 epochs): convnet 98.6 to 99.3 % validation
# accuracy for rates from 0.02 to 0.1, 12 s; mlp 97.9 %, 1 to 4 s. Fashion-MNIST, convnet:16, one
# epoch: 88.4 % at 0.05, 89.0 % at 0.1. An epoch of the full-width convnet takes about two minutes
# there, so give --epochs.
REAL = Recipe(epochs=30, warmup=1.5)

# Real images, networks with layer norm, which SGD trains badly. The customary values of
# DeiT (Touvron et al. 2021, arXiv:2012.12877) for this batch size; not tuned here.
REAL_ADAMW = Recipe(epochs=30, warmup=1.5, optimizer="adamw", lr=5e-4, weight_decay=0.05)

# Ten to a few hundred images, and the evaluation protocol: one budget of steps whatever the number
# of images. The KIP paper's networks take 5000 steps of SGD at a rate tuned for each set; SGD at
# one rate for all diverged or stood still here (ten random Fashion-MNIST images per class, MSE,
# convnet: 70.2 % at 0.01, 56.6 % at 0.03), and AdamW did not (73.9 %). Ten random digits per class:
# convnet 93.7 %, mlp 89.5 %. On two cores convnet takes 5 s on digits, 50 s on Fashion-MNIST.
SMALL = Recipe(steps=300, warmup=15, optimizer="adamw", lr=3e-3)
SMALL_LAYER_NORM = replace(SMALL, lr=5e-4, weight_decay=0.05)

# The KIP paper's training of its networks, in the units of our loss: theirs is the mean over
# classes, ours their sum, so for ten classes their L2 of 1e-3 is 1e-2 here and their rates are
# tenths. They take a share, found by a grid search, of the largest stable rate, from an empirical
# NTK of their data; here a grid stands for it, the same for all data. The largest stable rate is
# about c / width: without momentum c is 2 on digits, 0.2 on Fashion-MNIST (NTK of 20 images) and,
# by their figure, 0.7 on whitened CIFAR-10. So `lr` is of width 1, and the grid has two decades.
# Source: Nguyen et al. (2021), arXiv:2107.13034, and its public training notebook.
KIP = Recipe(
    steps=5000,
    batch_size=100,
    optimizer="momentum",
    lr=0.3,
    weight_decay=1e-2,
    decay_all=True,
)

# The recipe of the SuperGradients article on knowledge distillation, ResNet-50 from BEiT-base:
#   kd train FOLDER --recipe supergradients
# SuperGradients reports 81.9 % top-1 for ResNet-50 from BEiT (610 epochs of its own recipe); not
# run here: 24 EFLOP, 60 GFLOP an image. Deviations: gradients are divided by `accumulate`, the
# teacher's normalisation is not trained, and the warm-up rises every step instead of every epoch.
# timm's LAMB, like theirs, clips the gradient's norm at 1.
SUPERGRADIENTS = Recipe(
    epochs=310,
    batch_size=192,
    optimizer="lamb",
    lr=5e-3,
    weight_decay=0.02,
    warmup=5,
    warmup_from=1 / 6,
    cooldown=10,
    final=0.01,
    loss="ce:0.2,kd:0.8:temperature=1",
    augment="imagenet",
    auto_augment="rand-m7-mstd0.5",
    repeats=3,
    mixup=0.2,
    cutmix=1.0,
    ema=0.9999,
    average_best=10,
    precision="mixed",
    image_size=224,
    student="resnet50",
    teacher="beit_base_patch16_224",
    gpu=True,
)

# Plain knowledge distillation on ImageNet, ResNet-18 from ResNet-34 (Hinton et al. 2015,
# arXiv:1503.02531, in the customary 100 epochs):
#   kd train FOLDER --recipe hinton
# Published reproductions: 71.4 to 71.8 % top-1, from scratch 69.8 %, teacher 73.3 %; not run here:
# 2.3 EFLOP, 18 GFLOP an image.
HINTON = Recipe(
    epochs=100,
    batch_size=256,
    optimizer="momentum",
    lr=0.1,
    weight_decay=1e-4,
    decay_all=True,
    schedule="milestones",
    milestones=(30, 60, 90),
    loss="ce:0.5,kd:0.5:temperature=1",
    augment="imagenet",
    interpolation="bilinear",
    precision="mixed",
    image_size=224,
    student="resnet18",
    teacher="resnet34",
    gpu=True,
)

# A good teacher is patient and consistent (Beyer et al. 2022, arXiv:2106.05237): no labels, T = 1,
# the teacher sees the student's very view, mixed, for very long. Their ResNet-50 reaches 82.8 %
# after 9600 epochs from BiT-R152x2; 1200 are their compromise. Values of the authors' public
# configuration (a batch of 4096 over all devices, Adam with decoupled decay, clipped at norm 1);
# the teacher here is timm's copy of theirs. Not run here: 180 EFLOP, 116 GFLOP an image.
#   accelerate launch --num_processes 16 -m kd train FOLDER --recipe function_matching
FUNCTION_MATCHING = Recipe(
    epochs=1200,
    batch_size=256,
    optimizer="adamw",
    lr=0.03,
    weight_decay=3e-4,
    clip=1.0,
    warmup=16,  # 5000 steps of 4096 of ImageNet's 1.28 million images
    warmup_from=0.0,
    loss="fm:1",
    augment="imagenet",
    interpolation="bilinear",
    mixup=1.0,
    precision="mixed",
    image_size=224,
    student="resnetv2_50x1_bit",
    teacher="resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k",
    gpu=True,
)

# The protocol of the CIFAR-100 tables of this field (Tian et al. 2020, arXiv:1910.10699), weights
# of Hinton's loss included:
#   kd train cifar100 --recipe cifar --student STUDENT --teacher RUN
# Published: ResNet-56 to ResNet-20 70.7 % (from scratch 69.1 %). Not run here: 6 PFLOP.
CIFAR = Recipe(
    epochs=240,
    optimizer="momentum",
    lr=0.05,
    decay_all=True,
    schedule="milestones",
    milestones=(150, 180, 210),
    loss="ce:0.1,kd:0.9:temperature=4",
    augment="crop-flip",
)

# Data-efficient image transformers (Touvron et al. 2021, arXiv:2012.12877), hard-label
# distillation without the distillation token. Batch 1024 over all devices:
#   accelerate launch --num_processes 8 -m kd train FOLDER --recipe deit
# Its drop path of 0.1 is an argument of the network, to be given for another one too:
#   --student "deit_tiny_patch16_224(drop_path_rate=0.1)"
# Published for DeiT-small with token: 81.2 %. Not run here: 23 EFLOP, 59 GFLOP an image.
DEIT = Recipe(
    epochs=300,
    batch_size=128,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.05,
    warmup=5,
    warmup_from=1e-3,
    final=0.01,
    loss="ce:0.5,hard:0.5",
    label_smoothing=0.1,
    augment="imagenet",
    interpolation="bicubic",
    auto_augment="rand-m9-mstd0.5-inc1",
    random_erase=0.25,
    repeats=3,
    mixup=0.8,
    cutmix=1.0,
    ema=0.99996,
    precision="mixed",
    image_size=224,
    student="deit_small_patch16_224(drop_path_rate=0.1)",
    teacher="regnety_160.deit_in1k",
    gpu=True,
)

# Adversarially robust students of CIFAR-10, eps 8/255, in the customary 300 epochs of RSLAD's code:
#   kd train cifar10 --recipe pgd --student timm:resnet50 --out runs/robust
#   kd train cifar10 --recipe rslad --student timm:resnet18 --teacher runs/robust
# Published for ResNet-18, clean and AutoAttack: PGD training 82.8 and 44.6, TRADES 82.4 and 48.4,
# ARD 85.0 and 49.5, RSLAD 83.6 and 52.1, AdaAD 84.7 and 52.8. Not run here at this length: twelve
# times the passes of a plain training, AdaAD with as many of the teacher.
PGD = Recipe(
    epochs=300,
    batch_size=128,
    optimizer="momentum",
    lr=0.1,
    weight_decay=2e-4,
    decay_all=True,
    schedule="milestones",
    milestones=(215, 260, 285),
    loss="adv-ce:1",
    adversary="pgd:eps=8/255:steps=10:step=2/255",
    augment="crop-flip",
    metric="robust_accuracy",
)
TRADES = replace(PGD, loss="ce:1,trades:6")
ARD = replace(PGD, loss="ard:1:temperature=30")
RSLAD = replace(PGD, loss="rslad:5/6,kd:1/6:temperature=1")
ADAAD = replace(PGD, loss="adaad:1")

# Texts, transformers with pretrained weights: the customary values of fine-tuning (Devlin et al.
# 2019, arXiv:1810.04805, appendix A.3, who choose among 2e-5 to 5e-5 on each task; the weight decay
# is theirs).
FINETUNE = Recipe(
    epochs=3,
    batch_size=32,
    optimizer="adamw",
    lr=5e-5,
    weight_decay=0.01,
    clip=1.0,
    schedule="linear",
    warmup=0.3,
    warmup_from=0.0,
)

# Texts, networks with random weights: a BiLSTM, a fresh transformer.
FRESH = replace(FINETUNE, epochs=5, batch_size=64, lr=1e-3, warmup=0.5)

# BERT to BiLSTM (Tang et al. 2019, arXiv:1903.12136): nothing but the teacher's logits, on the
# training texts and twenty copies of each. Deviations: AdamW for AdaDelta, 3 epochs of the 21-fold
# set for 30; random embeddings; no part-of-speech tags, see `kd.data.text.word_replacement`.
# Published on SST-2: 86.7 % by labels, 90.7 % distilled.
#   kd train sst2/ --student bilstm:150 --teacher RUN --recipe bilstm
BILSTM = replace(FRESH, epochs=3, loss="logits:1", augment="words", student="bilstm")

# Patient knowledge distillation (Sun et al. 2019, arXiv:1908.09355): the first token of every
# block, beside logits and labels, with the middle of their grids; 4 epochs of batches of 32. Their
# weight of 100 is of a mean over all values, see `kd.losses.patient`.
# Published on SST-2, 6 of 12 blocks: 91.1 % by PKD, 89.7 % fine-tuned.
#   kd train sst2/ --student teacher --keep-layers 1,3,5 --teacher RUN --recipe pkd
PKD = replace(FINETUNE, epochs=4, warmup=0.4, loss="ce:0.5,kd:0.5:temperature=10,patient:0.1")

# TinyBERT (Jiao et al. 2020, arXiv:1909.10351), its two stages on a task: hidden states and
# attention scores at a constant rate, then the teacher's answers. Their first stage takes 5 to 50
# epochs, of the augmented set; SST-2 10. Their general stage, the same loss on a corpus from a
# pretrained BERT, is `--task mlm --recipe tinybert-intermediate`.
#   kd train sst2/ --student bert:4x312 --teacher RUN --recipe tinybert
TINYBERT_INTERMEDIATE = replace(
    FINETUNE, epochs=10, schedule="constant", warmup=0.0, loss="hidden:1,scores:1"
)
TINYBERT_PREDICTION = replace(FINETUNE, loss="kd:1:temperature=1")

# DistilBERT (Sanh et al. 2019, arXiv:1910.01108) on a corpus: the masked model's answers, the
# hidden tokens, and the direction of the last hidden states; weights of the authors (5, 2, 1).
# Deviations: tokens are hidden with one probability, whatever their frequency, and AdamW has its
# usual betas.
#   kd train corpus.txt --task mlm --student teacher --keep-layers 0,2,4 --teacher hf:DIR \
#     --recipe distilbert
DISTILBERT = replace(
    FINETUNE,
    lr=5e-4,
    weight_decay=0.0,
    clip=5.0,
    warmup=0.15,
    loss="tokens:5:temperature=2,mlm:2,cosine:1",
)

# MiniLM's second version (Wang et al. 2021, arXiv:2012.15828) on a corpus: relations of queries,
# keys and values in the last block, whatever width and heads the student has.
#   kd train corpus.txt --task mlm --student bert:6x384 --teacher hf:DIR --recipe minilm
MINILM = replace(FINETUNE, lr=5e-4, warmup=0.15, loss="relations:1:heads=48")

# Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947): the teacher's own texts are the
# training set, so that any tokenizer will do.
#   kd train chat.jsonl --task causal --student hf:SMALL --teacher hf:LARGE --recipe sequence
SEQUENCE = replace(FINETUNE, loss="clm:1", augment="teacher")

# Generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649) with the settings of
# TRL: half of the batches hold what the student itself writes, and the divergence lies half-way.
#   kd train chat.jsonl --task causal --student hf:SMALL --teacher hf:LARGE --recipe gkd
GKD = replace(FINETUNE, loss="tokens:1:temperature=1:beta=0.5:targets=1", on_policy=0.5)

# The losses where neither the user nor the recipe names one.
ADAPTING_EPOCHS = 10
LABEL_LOSS = "ce:1"
TEACHER_LOSS = "ce:0.1,kd:0.9:temperature=4"  # Hinton's loss
FEATURE_LOSS = "srd:2"  # of a student without a head
SEVERAL_LABELS_LOSS = "bce:1"  # of images with any number of labels
SEVERAL_LABELS_TEACHER_LOSS = "bce:0.1,mld:0.9:temperature=1"
SEVERAL_LABELS_MUTUAL_LOSS = "bce:1,mld:1:temperature=1"
TRANSFER_LOSS = "kd:1:temperature=4"  # of images without labels
MUTUAL_LOSS = "ce:1,kd:1:temperature=1"  # of deep mutual learning
ADVERSARIAL_LABEL_LOSS = "adv-ce:1"  # PGD training
ADVERSARIAL_TEACHER_LOSS = "rslad:5/6,kd:1/6:temperature=1"

NAMED: Mapping[str, Recipe] = {
    "supergradients": SUPERGRADIENTS,
    "hinton": HINTON,
    "function_matching": FUNCTION_MATCHING,
    "cifar": CIFAR,
    "distilled_set": SMALL,
    "deit": DEIT,
    "pgd": PGD,
    "trades": TRADES,
    "ard": ARD,
    "rslad": RSLAD,
    "adaad": ADAAD,
    "finetune": FINETUNE,
    "bilstm": BILSTM,
    "pkd": PKD,
    "tinybert": TINYBERT_PREDICTION,
    "tinybert-intermediate": TINYBERT_INTERMEDIATE,
    "distilbert": DISTILBERT,
    "minilm": MINILM,
    "sequence": SEQUENCE,
    "gkd": GKD,
}
# Recipe -> its loss for scores (`--task regress`), where its own takes classes: squared errors in
# place of cross-entropy and of the divergence from the teacher, with the same weights. TinyBERT's
# code fits the labels there, which is `--loss mse:1`.
REGRESSION_LOSSES: Mapping[str, str] = {
    "pkd": "mse:0.5,logits:0.5,patient:0.1",
    "tinybert": "logits:1",
}
OF_TEXTS = (
    "finetune",
    "bilstm",
    "pkd",
    "tinybert",
    "tinybert-intermediate",
    "distilbert",
    "minilm",
    "sequence",
    "gkd",
)
# Recipe -> recipes of the trainings before its own, each of which trains the student on.
STAGES: Mapping[str, tuple[str, ...]] = {"tinybert": ("tinybert-intermediate",)}


def by_name(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        UserError: If there is none.
    """
    if name not in NAMED:
        raise unknown_name("recipe", name, NAMED)
    return NAMED[name]


def adapting(recipe: Recipe) -> Recipe:
    """A recipe for a trained student that is pruned or quantised, and does not learn anew."""
    length = {"epochs": ADAPTING_EPOCHS} if recipe.steps is None else {}
    return replace(recipe, lr=recipe.lr / 10, warmup=0, **length)


def default_of_texts(*, pretrained: bool) -> Recipe:
    """The recipe for texts where none is named.

    Args:
        pretrained: Whether the student's weights are those of a trained network.
    """
    return FINETUNE if pretrained else FRESH


def default(*, distilled: bool, layer_norm: bool) -> Recipe:
    """The recipe for a kind of data and of network, where none is named.

    Args:
        distilled: Whether the data are a distilled set, as opposed to real images.
        layer_norm: Whether the network has layer norm, as transformers and ConvNeXt do.
    """
    if distilled:
        return SMALL_LAYER_NORM if layer_norm else SMALL
    return REAL_ADAMW if layer_norm else REAL

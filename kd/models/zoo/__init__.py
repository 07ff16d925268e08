"""Where networks come from: built in, timm, torchvision, Hugging Face, files, programs."""

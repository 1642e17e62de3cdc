"""A plain TorchServe handler, as its documentation teaches: BaseHandler with two hooks.

Without torchvision, which a torch without CUDA cannot load as it comes: Pillow and torch do what
its ToTensor would.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import map_class_to_label


class DigitClassifier(BaseHandler):
    """Classifies an image; model and index_to_name.json are loaded by the base."""

    def preprocess(self, data):
        """Turn each request's image into a tensor."""
        images = []
        for row in data:
            image = Image.open(io.BytesIO(row.get("data") or row.get("body")))
            image = image.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            images.append(pixels.float() / 255)
        return torch.stack(images).to(self.device)

    def postprocess(self, data):
        """Answer the five best labels with their probabilities."""
        probabilities, classes = torch.topk(F.softmax(data, dim=1), 5, dim=1)
        return map_class_to_label(probabilities.tolist(), self.mapping, classes.tolist())

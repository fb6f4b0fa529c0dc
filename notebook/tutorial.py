"""What notebooks need of the machine they run on, and are not about. Import it before this project's own modules."""

import os
import socket
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `deployment`
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this environment's commands
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*pickle.*")  # the learners that are loaded are the reader's own


def imagenet_weights(arch: str, wanted: str = "auto") -> bool:
    """Whether a learner can start from the ImageNet weights of `arch`, a name in torchvision.

    They are downloaded unless this machine has them; ten seconds without an answer mean that they cannot be had.

    Args:
        wanted: "yes", "no", or "auto" for what can be had.

    Raises:
        ValueError: `wanted` is none of these.
        ConnectionError: they are wanted by "yes" and cannot be had.
    """
    from torchvision.models import get_model  # slow to import

    if wanted not in ("auto", "yes", "no"):
        raise ValueError(f'PRETRAINED is "auto", "yes" or "no", not {wanted!r}')
    if wanted == "no":
        return False
    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        get_model(arch, weights="DEFAULT")
    except (OSError, RuntimeError) as e:  # no network, or a proxy's page in place of the file
        if wanted == "yes":
            raise ConnectionError(f'no weights for {arch} ({e}): connect this machine, or PRETRAINED = "no"') from e
        return False
    finally:
        socket.setdefaulttimeout(usual)
    return True

#!/bin/sh
# Make .venv and fill it with requirements.txt; `make` runs this when it has to. TORCH_BACKEND says which build of
# PyTorch: any value of `uv pip install --torch-backend`, pypi, or auto, which chooses between cpu and pypi.
set -eu
cd "$(dirname "$0")"
fail() { echo "error: $1" >&2; exit 1; }

# The first Python of a supported version makes the environment. Where there is none, any Python 3 gets uv from PyPI,
# which fetches one.
if ! .venv/bin/python -c '' 2>/dev/null; then
  found= other=
  for p in python3 python3.13 python3.14 python3.12 python3.11 python3.10 python; do
    case $($p -c 'import sys; print(sys.version_info[0], (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null) in
      "3 True") found=$p; break;;
      "3 False") other=${other:-$p};;
    esac
  done
  if [ "$found" ]; then
    echo "making .venv with $($found --version)"
    $found -m venv --clear .venv || fail "$found cannot make a virtual environment (Debian: apt install python3-venv)"
  else
    [ "$other" ] || fail "Python 3.10 to 3.14 is needed; no Python 3 is on the PATH"
    echo "$($other --version) is none of 3.10 to 3.14: uv fetches Python 3.13 for .venv"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    { $other -m venv "$scratch" && "$scratch/bin/python" -m pip install --quiet --disable-pip-version-check uv &&
      "$scratch/bin/python" -m uv venv --quiet --clear --seed --python 3.13 .venv; } >"$scratch/log" 2>&1 ||
      fail "no Python 3.13 could be fetched ($(tail -1 "$scratch/log")): install one of Python 3.10 to 3.14"
  fi
fi
PY=.venv/bin/python
$PY -m pip install --quiet --disable-pip-version-check uv==0.13.9 || fail "PyPI cannot be reached: uv is not installed"

# PyPI's build of PyTorch for Linux brings NVIDIA's libraries along; PyTorch's own index has one without.
backend=${TORCH_BACKEND:-auto} choice="chosen by TORCH_BACKEND"
if [ "$backend" = auto ]; then
  backend=pypi
  if [ "$(uname)" != Linux ]; then choice="the only one for $(uname)"
  elif [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then choice="an NVIDIA driver is here"
  elif $PY -c 'import urllib.request as r; r.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=5)' 2>/dev/null
  then backend=cpu choice="no NVIDIA driver is here"
  else choice="no NVIDIA driver is here, but PyTorch's index, which has a smaller build, cannot be reached"
  fi
fi
size="about 7 GB"
if [ "$backend" = cpu ] || [ "$(uname)" != Linux ]; then size="about 2 GB"; fi
echo "installing into .venv, $size, which takes some minutes: PyTorch's build $backend ($choice)"
if [ "$backend" = pypi ]; then
  $PY -m uv pip install --quiet --python $PY -r requirements.txt
else  # constraints.txt pins what PyPI's build brings along; another one brings its own, and may end with an older PyTorch
  pins=$(mktemp) torch=$(mktemp)
  grep -vE '^(cuda|nvidia|triton|torch(vision)?=)' constraints.txt >"$pins"
  if $PY -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    awk -v build="$backend" '$1 == build { print "torch==" $2 "\ntorchvision==" $3 }' torch-builds.txt >"$torch"
  fi
  grep -v '^-c' requirements.txt |
    $PY -m uv pip install --quiet --python $PY --torch-backend="$backend" --constraints "$pins" --overrides "$torch" -r -
  rm "$pins" "$torch"
fi
touch .venv/installed

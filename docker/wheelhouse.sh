#!/bin/sh
# Put every wheel that the images need into docker/wheels, so that they can be built without a network:
#
#   sh docker/wheelhouse.sh [options for pip, e.g. --extra-index-url of CPU builds of torch]
#
# PYTHON  an interpreter of the image's version on the image's kind of machine (default python3; Debian 12 has 3.11)
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}"
find docker/wheels -name '*.whl' -delete
"$PYTHON" - >docker/wheels/requirements.txt <<'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(["setuptools", *project["dependencies"], *extras["sql"], *extras["keyring"]]))
END
"$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary :all: --constraint constraints.txt \
    --dest docker/wheels --requirement docker/wheels/requirements.txt "$@"
rm docker/wheels/requirements.txt
du -sh docker/wheels

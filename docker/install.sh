#!/bin/sh
# Runs while an image is built. pip stays in the build stages: the image gets what it installed, and nothing that installs.
#
#   install.sh tools                 /python/build: pip, setuptools and the settings of pip
#   install.sh wheel [EXTRA,...]     /python/package: Cohortium as a wheel, from /src, and which extras go with it
#   install.sh dependencies          /python/venv: what pyproject.toml asks for, in the versions of constraints.txt
#   install.sh package               that wheel and its extras, into /python/venv
#
# With wheels in /wheels (docker/wheelhouse.sh puts them there) no index is asked.
set -eu
here=$(dirname "$0")/..
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT="$here/constraints.txt"
export PYTHONDONTWRITEBYTECODE=1
if [ -s /python/build/extra ]; then
    PIP_EXTRA=$(cat /python/build/extra)
fi

install_for() {
    python=$1
    shift
    if ls /wheels/*.whl >/dev/null 2>&1; then
        set -- --no-index --find-links /wheels "$@"
    else
        # shellcheck disable=SC2086  # several options in one build argument
        set -- ${PIP_EXTRA:-} "$@"
    fi
    /python/build/bin/python -m pip --python "$python" install --quiet --no-compile "$@"
}

# Out goes what runs nothing (other projects' tests and C++ headers, 0.3 GB) and the `uv` with which Flower would install
# code. The root file system is read-only later: what is not compiled here would be compiled again at every start.
finish() {
    rm -f /python/venv/bin/uv /python/venv/bin/uvx
    cd /python/venv/lib/python3.*/site-packages
    rm -rf torch/test torch/include torch/share pyarrow/include pyarrow/src
    find numpy scipy sklearn pandas pyarrow networkx sympy -type d -name tests -prune -exec rm -rf {} +
    # Some files are for a newer Python than this one and do not compile.
    /python/venv/bin/python -m compileall -qq -j 0 /python/venv/lib || true
}

case "$1" in
tools)
    python3 -m venv /python/build
    # Build arguments are seen in the history of the stage that takes them, so they end here.
    printf '%s' "${PIP_EXTRA:-}${PIP_INDEX_URL:+ --index-url $PIP_INDEX_URL}" >/python/build/extra
    PIP_EXTRA=$(cat /python/build/extra)
    install_for /python/build/bin/python setuptools
    ;;
wheel)
    /python/build/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /python/package /src
    printf '%s' "$(ls /python/package/*.whl)${2:+[$2]}" >/python/package/requirement
    ;;
dependencies)
    python3 -m venv --without-pip /python/venv
    python3 - "$here/pyproject.toml" >/tmp/requirements.txt <<'END'
import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))
END
    install_for /python/venv/bin/python --requirement /tmp/requirements.txt
    rm /tmp/requirements.txt
    finish
    ;;
package)
    install_for /python/venv/bin/python "$(cat /python/package/requirement)"
    /python/build/bin/python -m pip --python /python/venv/bin/python check
    finish
    ;;
*)
    exit 2
    ;;
esac

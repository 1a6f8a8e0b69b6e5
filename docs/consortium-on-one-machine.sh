#!/usr/bin/env bash
# A coordinator and four hospitals on this one machine: separate processes and folders, separate users where root
# starts it, real TLS on loopback. Ends by holding the synthetic table against the one that `cohortium simulate`
# gives from the same seed: they are the same bytes.
#
#   bash docs/consortium-on-one-machine.sh [FOLDER]      COHORTIUM_TRY_PORTS: the first of four ports (7440)
#                                                        COHORTIUM_TRY_STUDY: another study of the demo's table
#
# A rehearsal: --seed makes everything reproducible, its noise too. A real study leaves --seed and --rehearsal-seed out.
set -euo pipefail

work=$(realpath -m "${1:-consortium-try}")
port=${COHORTIUM_TRY_PORTS:-7440}
seed=7
here=$(python -c 'from importlib import resources; print(resources.files("cohortium.simulations"))')
study=${COHORTIUM_TRY_STUDY:-$here/scenarios/demo.toml}
mkdir -p "$work"
chmod 0711 "$work"

root=no
if [ "$(id -u)" = 0 ]; then root=yes; fi
users=()
user() { # user NAME: a user without home and password, as root only; gone again at the end
  if [ $root = yes ] && ! id "$1" >/dev/null 2>&1; then
    useradd --system --user-group --no-create-home --shell /usr/sbin/nologin "$1"
    users+=("$1")
  fi
}
become() { # become USER COMMAND...: takes this shell's place, so that a signal to it reaches the command
  local name=$1
  shift
  if [ $root = yes ]; then exec setpriv --reuid="$name" --regid="$name" --init-groups env HOME="$work" "$@"; fi
  exec "$@"
}
as() { (become "$@"); } # as USER COMMAND...
folder() { # folder USER PATH
  mkdir -p "$2"
  chmod 0700 "$2"
  if [ $root = yes ]; then chown "$1:" "$2"; fi
}
wait_for() { # wait_for FILE WORD: until the word is in the file, two minutes at most
  for _ in $(seq 240); do
    if grep -q "$2" "$1" 2>/dev/null; then return; fi
    sleep 0.5
  done
  echo "no '$2' in $1:" >&2
  cat "$1" >&2
  exit 1
}
started=()
stop() {
  for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  wait || true
  for name in "${users[@]}"; do userdel "$name" 2>/dev/null || true; done
}
trap stop EXIT

echo "== The demo's table over four hospitals, simulated: what the consortium's result is held against."
cohortium simulate "$study" --table "$here/data/heart.parquet" --split by:hospital --seed $seed --out "$work/simulated"

echo "== The coordinator."
user cohortium-coord
folder cohortium-coord "$work/coordinator"
consortium=$work/coordinator/try
printf 'words that open the root key' >"$work/coordinator/passphrase"
chmod 0600 "$work/coordinator/passphrase"
if [ $root = yes ]; then chown cohortium-coord: "$work/coordinator/passphrase"; fi
as cohortium-coord cohortium consortium init "$consortium" --name try --host 127.0.0.1 \
  --passphrase-file "$work/coordinator/passphrase" \
  --superlink-port "$port" --service-port $((port + 1)) --enrol-port $((port + 2)) --fleet-port $((port + 3))
become cohortium-coord cohortium serve "$consortium" >"$work/serve.log" 2>&1 &
started+=($!)
wait_for "$work/serve.log" ready

echo "== Four hospitals: each is invited, enrols with its first command, and joins with its second."
sites=$(ls "$work/simulated/sites")
for site in $sites; do
  home=$work/$site
  mkdir -p "$home" && chmod 0711 "$home"
  as cohortium-coord cohortium sites invite "$consortium" "$site" --out "$work/coordinator/$site.invitation" >/dev/null
  mv "$work/coordinator/$site.invitation" "$home/invitation"
  cp "$work/simulated/sites/$site/data.parquet" "$home/data.parquet"
  if [ $root = yes ]; then
    user "coh-$site-guard"
    user "coh-$site-courier"
    chown root: "$home/invitation"
    chown "coh-$site-guard:" "$home/data.parquet"
    chmod 0600 "$home/data.parquet"
  fi
  cohortium site init "$home/site" --invitation "$home/invitation" --table "$home/data.parquet" \
    --lifetime-epsilon 9 --lifetime-delta 1e-6 --unit patient --hospitals 1 \
    --minimum-sites 4 --minimum-colluders 1 --minimum-patients 50 \
    --generator joined --strategy secure-sum --evaluation --rehearsal-seed $seed
  two_users=()
  if [ $root = yes ]; then two_users=(--guard-user "coh-$site-guard" --courier-user "coh-$site-courier"); fi
  cohortium site join "$home/site" "${two_users[@]}" >"$home/join.log" 2>&1 &
  started+=($!)
done
for site in $sites; do wait_for "$work/$site/join.log" ready; done
as cohortium-coord cohortium sites list "$consortium"

echo "== The study is proposed; each officer looks at it and approves it with the third command."
run=$(as cohortium-coord cohortium run "$consortium" "$study" --seed $seed --yes --detach --json |
  python -c 'import json, sys; print(json.load(sys.stdin)["run"])')
for site in $sites; do
  cohortium site approve "$work/$site/site" "$run" --yes
done

echo "== The run."
as cohortium-coord cohortium watch "$consortium" "$run"
result=$consortium/runs/$run
as cohortium-coord cohortium audit "$result"
cmp "$work/simulated/synthetic.csv" "$result/synthetic.csv"
echo "The consortium's synthetic table is byte for byte the simulation's: $result/synthetic.csv"

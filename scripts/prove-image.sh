#!/usr/bin/env bash
# Runs the Dockerfile's steps for a variant where there is no container engine: stage by stage in roots that debootstrap
# makes, then checks what the final one holds, how large it is, and that it works for its user.
#
#   scripts/prove-image.sh [--variant cpu|cuda] [--binary target/release/handler]
#
# --binary puts a binary that is built already in the place of the build, which takes minutes. Needs root, debootstrap,
# Debian's mirror, for `cuda` PyPI, and without --binary the Rust toolchain of this machine, which stands for that of the
# Rust image. The roots stay in target/prove-image; the first, bare one is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
mirror=http://deb.debian.org/debian
work=$PWD/target/prove-image

variant=cpu
binary=""
while [ $# -gt 0 ]; do
  case "$1 ${2:-}" in
    "--variant cpu" | "--variant cuda") variant=$2 ;;
    "--binary "?*) binary=$(realpath "$2") ;;
    *)
      sed -n '2,10s/^# \?//p' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done
# The most that the final root may take.
limit_mb=120
[ $variant = cpu ] || limit_mb=1000

# What `debian:bookworm-slim` is: a minimal root without documentation, whose apt keeps nothing.
bare() {
  [ -e "$work/bare/.complete" ] && return
  rm -rf "$work/bare"
  mkdir -p "$work/bare"
  debootstrap --variant=minbase bookworm "$work/bare" "$mirror" >"$work/debootstrap.log"
  cat >"$work/bare/etc/dpkg/dpkg.cfg.d/slim" <<'CONF'
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/locale/*
CONF
  cat >"$work/bare/etc/apt/apt.conf.d/slim" <<'CONF'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
CONF
  rm -rf "$work/bare"/{var/lib/apt/lists/*,var/cache/apt/*,var/log/*,usr/share/man/*,usr/share/locale/*}
  find "$work/bare/usr/share/doc" -type f ! -name copyright -delete
  find "$work/bare/usr/share/doc" -depth \( -type l -o -type d -empty \) -delete
  touch "$work/bare/.complete"
}

# inside ROOT USER DIRECTORY COMMAND…: with the environment in the array `env`.
inside() {
  # shellcheck disable=SC2016 # The inner shell expands its own arguments.
  unshare --mount --pid --fork bash -c '
    set -euo pipefail
    root=$1 user=$2 dir=$3 rust=$4
    shift 4
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/dev"
    for node in null zero random urandom; do
      touch "$root/dev/$node"
      mount --bind "/dev/$node" "$root/dev/$node"
    done
    touch "$root/etc/resolv.conf"
    mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
    if [ -n "$rust" ]; then
      mkdir -p "$root/usr/local/rust" "$root/usr/local/cargo/registry"
      mount --bind -o ro "$rust" "$root/usr/local/rust"
      mount --bind "${CARGO_HOME:-$HOME/.cargo}/registry" "$root/usr/local/cargo/registry"
    fi
    exec chroot --userspec="$user" "$root" /usr/bin/env --ignore-environment --chdir="$dir" "$@"
  ' inside "$1" "$2" "$3" "$rust" "${env[@]}" "${@:4}"
}

# One instruction a line: continuation lines joined, comments gone.
instructions() {
  awk '/^[[:space:]]*(#|$)/ { next }
       { line = line $0 }
       sub(/\\$/, "", line) { next }
       { print line; line = "" }' Dockerfile
}

# What .dockerignore lets through.
context() {
  sed -n 's/^!//p' .dockerignore | xargs cp -a --parents -t "$1"
}

copy() {
  local from="" to=("$@")
  if [[ "$1" == --from=* ]]; then
    from=$work/${1#--from=}
    to=("${@:2}")
  fi
  local dest=$root${to[-1]}
  [[ "${to[-1]}" == /* ]] || dest=$root$dir/${to[-1]}
  unset 'to[-1]'
  mkdir -p "$dest"
  if [ "${to[*]}" = . ]; then
    context "$dest"
  elif [ -n "$from" ]; then
    # A folder's content, or a file.
    for path in "${to[@]}"; do
      if [ -d "$from$path" ]; then cp -a "$from$path/." "$dest"; else cp -aL "$from$path" "$dest"; fi
    done
  else
    cp -a "${to[@]}" "$dest"
  fi
}

bare
rm -rf "$work"/{source,build-cpu,build-cuda,build,final}
skip=""
while IFS= read -r line; do
  word=${line%% *} rest=${line#* }
  case $word in
    FROM)
      read -r base _ name <<<"${rest//\$\{VARIANT\}/$variant}"
      skip=""
      if [[ "$name" == build-* && "$name" != "build-$variant" ]]; then
        skip=yes
        continue
      fi
      echo "== $name, from $base"
      root=$work/$name user=0:0 dir=/ rust="" shell=(/bin/sh -c)
      env=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive)
      [[ "$base" == *_IMAGE* ]] && base=bare
      cp -a "$work/$base" "$root"
      # The Rust image has a toolchain, and the linker that it needs.
      if [ "$name" = "build-$variant" ]; then
        dir=/src
        # Where a proxy signs what is downloaded, this machine knows it. Nothing of this stage but /out goes on.
        cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
        env+=(PIP_CERT=/etc/ssl/certs/ca-certificates.crt)
        if [ -n "$binary" ] && [ "$variant" = cpu ]; then
          install -D "$binary" "$root/src/target/release/handler"
          install -D /bin/true "$root/usr/local/bin/cargo"
        elif [ -n "$binary" ]; then
          install -D "$binary" "$root/src/target/cuda/handler"
          cp "$root/src/scripts/cuda/libraries.txt" "$root/src/target/cuda/"
          install -D /bin/true "$root/src/scripts/build-cuda.sh"
        else
          rust=$(rustc --print sysroot)
          env+=(CARGO_HOME=/usr/local/cargo "PATH=/usr/local/rust/bin:/usr/bin:/bin")
        fi
      fi
      ;;
    *) [ -z "$skip" ] || continue ;;&
    RUN)
      echo "-- RUN $rest"
      inside "$root" "$user" "$dir" "${shell[@]}" "$rest" >"$work/step.log" 2>&1 || {
        tail -40 "$work/step.log" >&2
        exit 1
      }
      ;;
    COPY)
      read -ra paths <<<"$rest"
      copy "${paths[@]}"
      ;;
    WORKDIR)
      dir=$rest
      mkdir -p "$root$dir"
      ;;
    USER) user=$rest ;;
    ENV) read -ra set <<<"$rest" && env+=("${set[@]}") ;;
    SHELL) mapfile -t shell < <(python3 -c 'import json, sys; print(*json.loads(sys.argv[1]), sep="\n")' "$rest") ;;
    ARG | LABEL | EXPOSE | STOPSIGNAL | HEALTHCHECK | ENTRYPOINT) ;;
    *)
      echo "no such instruction is known: $line" >&2
      exit 1
      ;;
  esac
done < <(instructions)

echo "== checks, as $user in $dir"
rm -f "$root/.complete"
handler() { inside "$root" "$user" "$dir" /usr/local/bin/handler "$@"; }
needed=$(inside "$root" "$user" "$dir" ldd /usr/local/bin/handler)
echo "$needed"
[[ "$needed" != *'not found'* ]]
[ -s "$root/etc/ssl/certs/ca-certificates.crt" ]
strays=$(find "$root" -xdev \( -name 'python*' -o -name 'pip*' -o -name '*.safetensors' -o -name '*.pth' -o -name cargo \) \
  -not -path '*/share/*')
[ -z "$strays" ] || { echo "the image holds: $strays" >&2 && exit 1; }
handler --version
if handler --help | grep -q '^  doctor '; then
  handler doctor --quick
else
  echo "this binary has no \`doctor\`, so the HEALTHCHECK was not run"
fi
handler generate --model tiny --steps 1 --quiet --output talkie.mp4
size=$(stat -c %s "$root$dir/talkie.mp4")
rm "$root$dir/talkie.mp4"
mb=$(du -sx --apparent-size --block-size=1000000 "$root" | cut -f 1)
binary_mb=$(du --apparent-size --block-size=1000000 "$root/usr/local/bin/handler" | cut -f 1)
echo "a video of $size bytes; the image takes $mb MB unpacked, $binary_mb of them the binary"
[ "$mb" -le "$limit_mb" ] || { echo "expected at most $limit_mb MB" >&2 && exit 1; }

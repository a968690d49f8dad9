# shellcheck shell=bash
# Sourced by build-uml.sh and fetch-kernels.sh: an apt configuration of their own, so that packages of other Debian suites can be
# listed and downloaded without adding a source to the machine. Nothing is installed through it.

die() { echo "${0##*/}: $*" >&2; exit 1; }

# need COMMAND PACKAGE ... : fails, naming the packages of all missing commands
need() {
  local missing=()
  while (($#)); do
    command -v "$1" >/dev/null || missing+=("$2")
    shift 2
  done
  ((${#missing[@]} == 0)) || die "missing packages: run apt-get install -y --no-install-recommends $(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')"
}

# debian_mirror : URI of the Debian archive that this machine's apt uses (DEBIAN_MIRROR overrides it)
debian_mirror() {
  [[ -z ${DEBIAN_MIRROR:-} ]] || { echo "${DEBIAN_MIRROR%/}"; return; }
  local uri
  uri=$({
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null | sed -n 's/^Debian //p'
    # lists not fetched yet: the sources themselves
    find /etc/apt/sources.list /etc/apt/sources.list.d -type f \( -name '*.list' -o -name '*.sources' \) -exec cat {} + 2>/dev/null |
      sed -nE 's/^URIs:[[:space:]]*//p; s/^deb[[:space:]]+(\[[^]]*\][[:space:]]*)?([^[:space:]]+).*/\2/p' | tr ' ' '\n' | grep -E '/debian/?$' || true
  } | head -n 1)
  [[ -n $uri ]] || die "this machine's apt knows no Debian archive: set DEBIAN_MIRROR to the URI of one"
  echo "${uri%/}"
}

# apt_private DIR SUITE ... : writes the configuration into DIR and fetches the package lists of the suites
apt_private() {
  need apt-get apt
  apt_dir=$1
  shift
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror suite
  [[ -e $keyring ]] || die "missing package: run apt-get install -y debian-archive-keyring"
  mirror=$(debian_mirror)
  mkdir -p "$apt_dir/lists/partial" "$apt_dir/archives/partial"
  for suite; do echo "deb [signed-by=$keyring] $mirror $suite main"; done >"$apt_dir/sources.list"
  apt_opts=(
    -qq
    -o Dir::Etc::sourcelist="$apt_dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$apt_dir/lists" -o Dir::Cache="$apt_dir" -o Dir::Cache::archives="$apt_dir/archives"
    -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any
  )
  apt-get "${apt_opts[@]}" update || die "apt-get update failed for $* from $mirror"
}

# apt_newest REGEX : newest package whose whole name matches
apt_newest() {
  apt-cache "${apt_opts[@]}" pkgnames | grep -xE -- "$1" | sort -V | tail -n 1 || true
}

# apt_unpack DIR PACKAGE ... : downloads packages (checked against the signed lists) and unpacks them, without installing, into DIR
apt_unpack() {
  local to=$1 pkg
  shift
  mkdir -p "$to"
  for pkg; do
    mkdir -p "$apt_dir/deb"
    (cd "$apt_dir/deb" && apt-get "${apt_opts[@]}" download "$pkg") || die "download of $pkg failed"
    dpkg-deb -x "$apt_dir"/deb/*.deb "$to"
    rm -r "$apt_dir/deb"
  done
}

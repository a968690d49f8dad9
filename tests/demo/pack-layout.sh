#!/bin/bash
# Writes an OCI image layout (image-spec 1.1: oci-layout, index.json, blobs/) from layer tar files, lowest first.
# The same layers and options give the same bytes.
set -euo pipefail
die() { echo "pack-layout.sh: $*" >&2; exit 1; }

output= tag=latest cmd='["/bin/sh"]' layers=()
while (($#)); do
  case $1 in
  --output | --tag | --cmd) (($# >= 2)) || die "$1 needs a value"; printf -v "${1#--}" %s "$2"; shift 2 ;;
  -*) die "usage: pack-layout.sh --output DIR [--tag latest] [--cmd JSON-ARRAY] LAYER.tar..." ;;
  *) layers+=("$1"); shift ;;
  esac
done
[[ -n $output ]] && ((${#layers[@]})) || die "wants --output DIR and at least one layer"
case $(uname -m) in
x86_64) architecture=amd64 ;;
aarch64) architecture=arm64 ;;
*) architecture=$(uname -m) ;;
esac

rm -rf "$output.new"
mkdir -p "$output.new/blobs/sha256"
blobs=$output.new/blobs/sha256

digest_of() { sha256sum <"$1" | cut -d ' ' -f 1; }

# descriptor MEDIA-TYPE FILE [MORE-MEMBERS] : moves FILE among the blobs and prints its descriptor
descriptor() {
  local digest
  digest=$(digest_of "$2")
  printf '{"mediaType":"%s","digest":"sha256:%s","size":%s%s}' "$1" "$digest" "$(stat -c %s "$2")" "${3:-}"
  mv "$2" "$blobs/$digest"
}

joined() { local IFS=,; echo "$*"; }

# gzip is the slow part, and every layer is a job of its own
jobs=()
for i in "${!layers[@]}"; do
  gzip -n -6 <"${layers[i]}" >"$output.new/layer$i" &
  jobs+=($!)
done
diff_ids=()
for layer in "${layers[@]}"; do diff_ids+=("\"sha256:$(digest_of "$layer")\""); done
for job in "${jobs[@]}"; do wait "$job" || die "gzip failed"; done

layer_descriptors=()
for i in "${!layers[@]}"; do
  layer_descriptors+=("$(descriptor application/vnd.oci.image.layer.v1.tar+gzip "$output.new/layer$i")")
done
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
printf '{"architecture":"%s","os":"linux","config":{"Env":["PATH=%s"],"Cmd":%s},"rootfs":{"type":"layers","diff_ids":[%s]}}' \
  "$architecture" "$path" "$cmd" "$(joined "${diff_ids[@]}")" >"$output.new/config"
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
  "$(descriptor application/vnd.oci.image.config.v1+json "$output.new/config")" "$(joined "${layer_descriptors[@]}")" \
  >"$output.new/manifest"
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s]}' \
  "$(descriptor application/vnd.oci.image.manifest.v1+json "$output.new/manifest" \
    ",\"annotations\":{\"org.opencontainers.image.ref.name\":\"$tag\"}")" >"$output.new/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$output.new/oci-layout"
rm -rf "$output"
mv "$output.new" "$output"

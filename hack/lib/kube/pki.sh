# shellcheck shell=bash
# Who is who in a cluster: its authorities, a certificate for each of its parts, and
# their kubeconfigs. Sourced, never run. Needs common.sh.
#
# PKI is the directory; it goes with the control plane's node.

# pki_make PKI ADDRESS...: the authorities and what the control plane needs.
# ADDRESS: by which the API server is reached.
pki_make() {
  local pki=$1 names
  names=$(printf ',IP:%s' "${@:2}")
  mkdir -m 700 "$pki"
  authority "$pki" ca
  # Extension API servers trust who this one vouches for, and nobody else.
  authority "$pki" front-proxy-ca
  issue "$pki" apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost$names"
  issue "$pki" apiserver-kubelet /O=system:masters/CN=kube-apiserver-kubelet
  issue "$pki" front-proxy /CN=front-proxy '' front-proxy-ca
  issue "$pki" admin /O=system:masters/CN=admin
  issue "$pki" controller-manager /CN=system:kube-controller-manager
  issue "$pki" scheduler /CN=system:kube-scheduler
  issue "$pki" proxy /CN=system:kube-proxy
  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$pki/service-account.key" 2>/dev/null
  openssl pkey -in "$pki/service-account.key" -pubout -out "$pki/service-account.pub"
}

# authority PKI NAME
authority() {
  certificate "$1" "$2" "/CN=$2" -addext basicConstraints=critical,CA:TRUE \
    -addext keyUsage=critical,digitalSignature,keyCertSign
}

# issue PKI NAME SUBJECT [ALTERNATIVE-NAMES [AUTHORITY]]: for clients and servers.
issue() {
  local -a options=(
    -CA "$1/${5:-ca}.crt" -CAkey "$1/${5:-ca}.key" -addext 'basicConstraints=critical,CA:FALSE'
    -addext 'extendedKeyUsage=clientAuth,serverAuth'
  )
  [[ -z ${4:-} ]] || options+=(-addext "subjectAltName=$4")
  certificate "$1" "$2" "$3" "${options[@]}"
}

# certificate PKI NAME SUBJECT OPTION...
certificate() {
  local path=$1/$2 subject=$3
  shift 3
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "$subject" \
    -keyout "$path.key" -out "$path.crt" "$@" 2>/dev/null || die "openssl could not make $path.crt"
}

# kubeconfig PKI NAME SERVER: everything in it, so that it works wherever it is.
kubeconfig() {
  cat <<END
apiVersion: v1
kind: Config
clusters:
- name: sterna
  cluster:
    server: $3
    certificate-authority-data: $(base64 -w0 "$1/ca.crt")
users:
- name: $2
  user:
    client-certificate-data: $(base64 -w0 "$1/$2.crt")
    client-key-data: $(base64 -w0 "$1/$2.key")
contexts:
- name: sterna
  context: { cluster: sterna, user: $2 }
current-context: sterna
END
}

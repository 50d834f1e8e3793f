# What the launchers share; each of them sources this file. It prints their help, looks for the options file, and starts torchrun.
# Nothing is changed but what is said: paths in the options, such as units/train and runs/, are below the folder you are in.

train="$(dirname "${BASH_SOURCE[0]}")/../train.py"
name="$(basename "$0")"

if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" | grep -v '^SBATCH'  # the comment at the top of the launcher
    exit 0
fi
if [[ ! -f ${1:-} ]]; then
    echo "$name: error: the first argument must be an options file, such as configs/pocket.toml; there is none at '${1:-}'" >&2
    exit 2
fi
arguments=("$@")

# Stop with a sentence if one of the named variables is not set.
need() {
    for variable in "$@"; do
        if [[ -z ${!variable:-} ]]; then
            echo "$name: error: $variable is not set; see $name --help" >&2
            exit 2
        fi
    done
}

# Become the command, or with DRY_RUN=1 print it.
run() {
    if [[ ${DRY_RUN:-} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}

# torchrun with these options, on train.py with the launcher's arguments. A run that --out already holds goes on.
launch() {
    run torchrun "$@" "$train" "${arguments[0]}" --auto-resume "${arguments[@]:1}"
}

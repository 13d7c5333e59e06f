# For scripts that run trainings: whatever ends the script ends what it runs, by SIGTERM, on which a
# training saves. A shell that waits for a command in the foreground would hear no signal until then.

python() {
    command python "$@" &
    wait $!
}

end_what_runs() {
    trap '' INT TERM HUP
    kill -TERM $(jobs -p) 2> /dev/null || true
    wait
}

watch() { # in the script, and in each of its subshells that runs by itself
    trap end_what_runs EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

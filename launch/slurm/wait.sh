# shellcheck shell=bash disable=SC2034 # status and signalled are for those who source this
# Sourced by job.sh and rank.sh: a program that they wait for, and signals that reach them meanwhile.

# Run a command to its end; "status" is what it left with then. SIGUSR1 and SIGTERM are handed on to it:
# as SIGUSR1 both, if $1 is USR1, or as they are. "signalled" tells whether there was one.
run_and_hand_on() {
    local as=$1 child='' again=1
    signalled=
    # shellcheck disable=SC2317,SC2329 # the traps call it
    hand_on() {
        again=1 signalled=1
        [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null || true
    }
    trap 'hand_on USR1' USR1
    # shellcheck disable=SC2064 # which signal it becomes is known now
    trap "hand_on ${as:-TERM}" TERM
    "${@:2}" &
    child=$!
    while [ -n "$again" ]; do # a signal ends "wait" early
        again=
        wait "$child" && status=0 || status=$?
    done
    trap '' USR1 TERM
}

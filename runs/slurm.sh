#!/usr/bin/env bash
# One training under Slurm, that comes back until its steps are done. From the repository's folder:
#
#     sbatch runs/slurm.sh train_stage1.py --model SiT-B/2 --out out/stage1
#
# Change the four lines below to your cluster, here or on sbatch's command line. docs/jobs.md says
# what was tried, and what goes wrong without which line.
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# One task a node: torchrun starts the processes. Slurm's own tasks would not find each other.
#SBATCH --ntasks-per-node=1
# Two minutes before the time limit this shell (B:) hears USR1 and stops the run, see below.
#SBATCH --signal=B:USR1@120
# After the stop, a preemption or a node's failure the job starts again, with the same output file.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -u
PATH="$PWD/.venv/bin:$PATH" # sbatch starts the job in the folder where it was called
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}} # of each node; export PROCESSES=2 without GPUs
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Signals for the run go through scancel: without --batch it reaches what srun has started, not this
# shell. They are SIGTERM, which torchrun passes on and waits for; USR1 would end torchrun itself.
stopped=
stop() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1
trap : TERM # of scancel and of a requeue, which signal the run themselves: wait for its end

# In the background, because bash runs a trap only when its foreground command has ended
srun --kill-on-bad-exit torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" "$@" &
while wait $!; status=$?; kill -0 $! 2>/dev/null; do :; done # a trap ends a wait before the run

# Only what was stopped comes back: a run that fails by itself stays failed
[ -z "$stopped" ] || [ "$status" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"

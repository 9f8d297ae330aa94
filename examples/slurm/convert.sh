#!/bin/bash
#SBATCH --job-name=convert
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
# sbatch examples/slurm/convert.sh traces/ archives/
#
# A task that is pre-empted, or out of time in two minutes, gets SIGUSR1: it finishes its sample and
# leaves with exit code 75. It is then queued again, and goes on where it was. In a step of srun, the
# signal reaches h5traces, not this shell.
set -u
srun --mpi=none --ntasks=1 "${H5TRACES:-h5traces}" convert "$1" -o "$2" --rank auto "${@:3}"
code=$?
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"

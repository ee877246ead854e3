#!/bin/bash
# One run on the nodes of a Slurm allocation: sbatch --nodes=2 cluster/deploy/slurm.sh configs/demo.yaml /shared/results
#
# A job that is preempted, runs out of time or loses a node is requeued and continues where it stopped. You may change,
# here or on sbatch's command line: nodes, CPUs, GPUs, time, and the environment below.
#SBATCH --job-name=evolver
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=evolver-%j.log

set -euo pipefail
config=${1:?give a configuration}
results=${2:?give a folder on a shared file system, or a URI}
python=${EVOLVER_PYTHON:-python}
ray=("$python" -m ray.scripts.scripts)

# Every job makes a token of its own, which only its nodes know.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-0}

start() { # starts Ray in the background: $1 is --head or --address=…, the rest are options of srun
    local given=("--num-cpus=$SLURM_CPUS_PER_TASK" "--num-gpus=$gpus" --block --disable-usage-stats)
    srun --overlap "${@:2}" "${ray[@]}" start "${given[@]}" "$1" "${extra[@]}" &
}
extra=("--port=$port" "--node-ip-address=$address" --include-dashboard=false)
start --head --nodes=1 --ntasks=1 --nodelist="$head"
export RAY_ADDRESS=$address:$port
for _ in $(seq 120); do
    "${ray[@]}" health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 && break
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    extra=()
    start "--address=$RAY_ADDRESS" --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head"
fi

# Slurm sends SIGTERM two minutes before the time limit and before a preemption. The driver then stops with exit status
# 3, everything that finished is kept, and the job is requeued.
"$python" evolve.py "$config" --results "$results" --run "${EVOLVER_RUN:-$SLURM_JOB_NAME-$SLURM_JOB_ID}" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM
status=0
wait "$driver" || status=$?
if kill -0 "$driver" 2>/dev/null; then # the signal ended the first wait, so wait again for the driver
    status=0
    wait "$driver" || status=$?
fi
if [ "$status" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

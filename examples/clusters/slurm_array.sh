#!/bin/bash
# One job for each share of the list. Submit it from the folder that holds hypotheses/ and the models:
#
#     sbatch --array=0-3 slurm_array.sh
#
# When all are done: delta-suite judge results
#SBATCH --job-name=delta-suite
#SBATCH --array=0-3
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=delta-suite-%A-%a.log
#SBATCH --requeue

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" # what was measured with fewer threads differs in the last digits

# 1 is a refuted claim, which is a result, or a model that could not be measured, which the log names.
pytest hypotheses/ --model="${MODELS:-checkpoints/step-*}" --calibration="${CALIBRATION:-core}" \
    --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" || [ $? -eq 1 ]

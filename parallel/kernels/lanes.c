#include "lanes.h"

void run_tasks(work_t work, const void *arg, long tasks, int threads) {
    if (threads <= 1 || tasks <= 1) {
        for (long task = 0; task < tasks; task++) work(arg, task);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long task = 0; task < tasks; task++) work(arg, task);
}

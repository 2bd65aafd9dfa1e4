/* stop.c - see stop.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/stop.h"

#include <signal.h>

static volatile sig_atomic_t child_pid, came;

static void pass_on(int number) {
    came = number;
    if (child_pid > 0) kill((pid_t)child_pid, SIGTERM);
}

void stop_catch(void) {
    const struct sigaction pass = { .sa_handler = pass_on, .sa_flags = SA_RESTART };
    sigaction(SIGINT, &pass, NULL);
    sigaction(SIGTERM, &pass, NULL);
}

bool stop_came(void) { return came != 0; }

void stop_pass_to(pid_t pid) {
    child_pid = (sig_atomic_t)pid;
    if (pid > 0 && came) kill(pid, SIGTERM);
}

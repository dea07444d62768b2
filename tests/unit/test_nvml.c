// What NVML says, and what becomes of it when it does not answer: against a library of our own (tests/fake_nvml.c).
#include "supervisor/nvml.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/clock.h"
#include "supervisor/probe.h"

static struct nvml_node node;
static struct err err;

static int probe(const char *machine, double seconds)
{
    char library[512];
    snprintf(library, sizeof library, "%s/tests/fake_nvml/libnvidia-ml.so.1", getenv("DITFLEET_BUILD"));
    setenv("FAKE_NVML", machine, 1);
    err = (struct err){.code = ERR_NONE};
    return nvml_probe(library, seconds, &node, &err);
}

static const struct nvml_device *gpu0(const char *machine)
{
    if (probe(machine, 10) != 0)
        fail_msg("%s: %s", machine, err.text);
    return &node.devices[0];
}

static void a_healthy_machine(void **state)
{
    (void)state;
    const struct nvml_device *d = gpu0("");
    assert_int_equal(node.rc, NVML_SUCCESS);
    assert_string_equal(node.driver, "580.95.05");
    assert_int_equal(node.cuda, 13000);
    assert_int_equal(node.count, 2);
    assert_int_equal(node.n, 2);
    assert_int_equal(d->fault, 0);
    assert_string_equal(d->name, "NVIDIA H100 80GB HBM3");
    assert_string_equal(d->bus, "0000FFFE:10:00.0");
    assert_int_equal(d->capability, 90);
    assert_true(d->memory_total == 80LL << 30);
    assert_true(d->memory_used == 4 << 20); // without what the driver reserves
    assert_int_equal(d->temperature, 35);
    assert_int_equal(d->temperature_slowdown, 90);
    assert_int_equal(d->sm_mhz, 1755);
    assert_int_equal(d->sm_max_mhz, 1980);
    assert_int_equal(d->power_limit_mw, 700000);
    assert_int_equal(d->reasons, NVML_REASON_IDLE); // by the older name
    assert_int_equal(d->ecc, 1);
    assert_int_equal(d->uncorrected, 0);
    assert_int_equal(d->retired_pending, NVML_UNKNOWN);
    assert_int_equal(d->brake_ns, NVML_UNKNOWN);
    assert_int_equal(d->recovery, NVML_RECOVERY_NONE);
    assert_int_equal(d->persistence, 1);
    assert_int_equal(d->mig, 0);
    assert_int_equal(d->pcie_width, 16);
    assert_int_equal(d->links, 18);
    assert_int_equal(d->links_active, 18);
    assert_int_equal(d->n_processes, 0);
    assert_int_equal(node.devices[1].minor, 1);
}

static void what_is_wrong_with_a_gpu(void **state)
{
    (void)state;
    const struct nvml_device *d = gpu0("throttled,ecc,pending,recovery,mig,no_persistence,x4,gen1");
    assert_true(d->reasons & NVML_REASON_HW_THERMAL);
    assert_int_equal(d->sm_mhz, 345);
    assert_int_equal(d->thermal_ns, 90000000000LL);
    assert_int_equal(d->uncorrected, 3);
    assert_int_equal(d->uncorrected_ever, 4);
    assert_int_equal(d->remapped, 1);
    assert_int_equal(d->remap_pending, 1);
    assert_int_equal(d->remap_failed, 0);
    assert_int_equal(d->recovery, NVML_RECOVERY_DRAIN_AND_RESET);
    assert_int_equal(d->mig, 1);
    assert_int_equal(d->persistence, 0);
    assert_int_equal(d->pcie_width, 4);
    assert_int_equal(d->pcie_width_max, 16);
    assert_int_equal(d->pcie_gen, 1);
    assert_int_equal(node.devices[1].uncorrected, 0);
    assert_int_equal(gpu0("retired")->retired_pending, 1);
}

static void programs_on_a_gpu(void **state)
{
    (void)state;
    const struct nvml_device *d = gpu0("busy");
    assert_int_equal(d->n_processes, 2); // each once, though they compute and draw
    assert_int_equal(d->processes[0].pid, 4242);
    assert_string_equal(d->processes[0].name, "python3");
    assert_true(d->processes[0].bytes == 20LL << 30);
    assert_string_equal(d->processes[1].name, "ditfleet-worker");
}

static void ways_between_gpus(void **state)
{
    (void)state;
    char way[NVML_PATH_TEXT];
    gpu0("gpus=4");
    assert_string_equal(nvml_path(&node, 0, 0, way), "X");
    assert_string_equal(nvml_path(&node, 0, 1, way), "NV18");
    assert_string_equal(nvml_path(&node, 1, 0, way), "NV18");
    assert_string_equal(nvml_path(&node, 0, 2, way), "SYS");
    assert_int_equal(node.pairs[0][1].links, 18);
    assert_int_equal(node.pairs[0][1].read, 0);
    gpu0("gpus=2,pcie");
    assert_string_equal(nvml_path(&node, 0, 1, way), "PXB");
    gpu0("gpus=2,no_p2p");
    assert_int_equal(node.pairs[0][1].read, 5);
    gpu0("gpus=2,links_down");
    assert_string_equal(nvml_path(&node, 0, 1, way), "NV12");
    assert_int_equal(node.devices[0].links_active, 12);
}

static void more_gpus_than_there_is_room_for(void **state)
{
    (void)state;
    gpu0("gpus=40");
    assert_int_equal(node.count, 40);
    assert_int_equal(node.n, NVML_MAX_GPUS);
}

static void what_is_not_told_is_unknown(void **state)
{
    (void)state;
    const struct nvml_device *d = gpu0("quiet");
    assert_int_equal(d->fault, 0);
    assert_int_equal(d->reasons, NVML_UNKNOWN);
    assert_int_equal(d->uncorrected, NVML_UNKNOWN);
    assert_int_equal(d->recovery, NVML_UNKNOWN);
    assert_int_equal(d->n_processes, NVML_UNKNOWN);
    assert_true(d->memory_used == 1LL << 30); // by the older question
    assert_int_equal(d->links, 0);
}

static void a_lost_gpu_leaves_the_others(void **state)
{
    (void)state;
    assert_int_equal(gpu0("lost")->fault, NVML_GPU_IS_LOST);
    assert_int_equal(node.devices[0].memory_total, NVML_UNKNOWN);
    assert_int_equal(node.devices[1].fault, 0);
    assert_int_equal(node.devices[1].capability, 90);
    assert_int_equal(node.pairs[0][1].level, NVML_UNKNOWN);
    assert_int_equal(gpu0("reset")->fault, NVML_RESET_REQUIRED);
    assert_int_equal(gpu0("lost_later")->fault, NVML_GPU_IS_LOST);
}

static void a_driver_that_does_not_start(void **state)
{
    (void)state;
    assert_int_equal(probe("mismatch", 10), ERR_UNAVAILABLE);
    assert_int_equal(node.rc, NVML_VERSION_MISMATCH);
    assert_int_equal(node.n, 0);
    assert_non_null(strstr(err.text, "another version"));
    assert_int_equal(probe("not_loaded", 10), ERR_UNAVAILABLE);
    assert_int_equal(node.rc, NVML_DRIVER_NOT_LOADED);
    assert_int_equal(probe("no_gpus", 10), 0);
    assert_int_equal(node.count, 0);
    assert_int_equal(nvml_probe("/nowhere/libnvidia-ml.so.1", 10, &node, &err), ERR_NOT_FOUND);
    assert_int_equal(node.rc, NVML_LIBRARY_NOT_FOUND);
}

static void nvml_that_hangs_or_dies_harms_nobody(void **state)
{
    (void)state;
    const double start = monotonic_seconds();
    assert_int_equal(probe("hang=init", 0.3), ERR_TIMEOUT);
    assert_int_not_equal(node.rc, NVML_SUCCESS);
    assert_int_equal(node.n, 0);
    assert_int_equal(probe("gpus=3,hang=1", 0.5), ERR_TIMEOUT);
    assert_true(monotonic_seconds() - start < 5);
    assert_int_equal(node.n, 1); // the one that answered before
    assert_string_equal(node.devices[0].name, "NVIDIA H100 80GB HBM3");
    assert_non_null(strstr(err.text, "it was asked about GPU 1"));
    assert_non_null(strstr(err.text, "0.5 s"));
    assert_int_equal(probe("crash", 10), ERR_INTERNAL);
}

static void body_that_writes(void *arg)
{
    *(int *)arg = 7;
}

static void a_probe_writes_to_its_memory(void **state)
{
    (void)state;
    int *shared = probe_alloc(sizeof *shared), mine = 1;
    assert_non_null(shared);
    assert_int_equal(probe_run(body_that_writes, shared, "it", 10, &err), 0);
    assert_int_equal(*shared, 7);
    assert_int_equal(probe_run(body_that_writes, &mine, "it", 10, &err), 0);
    assert_int_equal(mine, 1);
    probe_free(shared, sizeof *shared);
    probe_free(NULL, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_healthy_machine),
        cmocka_unit_test(what_is_wrong_with_a_gpu),
        cmocka_unit_test(programs_on_a_gpu),
        cmocka_unit_test(ways_between_gpus),
        cmocka_unit_test(more_gpus_than_there_is_room_for),
        cmocka_unit_test(what_is_not_told_is_unknown),
        cmocka_unit_test(a_lost_gpu_leaves_the_others),
        cmocka_unit_test(a_driver_that_does_not_start),
        cmocka_unit_test(nvml_that_hangs_or_dies_harms_nobody),
        cmocka_unit_test(a_probe_writes_to_its_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

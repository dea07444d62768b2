// doctor.h: what the parts of `ditfleet doctor` share: the list of findings.
//
// A part only reads and adds findings. What may hang or crash runs by doctor_guard in a process of its own, so the list
// lies in memory that such a process shares, and has no pointers.
#ifndef DITFLEET_CLI_DOCTOR_H
#define DITFLEET_CLI_DOCTOR_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/conf.h"
#include "supervisor/nvml.h"

enum verdict { VERDICT_OK, VERDICT_WARN, VERDICT_FAIL };
enum { DOCTOR_MAX_FINDINGS = 600, DOCTOR_NAME = 32, DOCTOR_TEXT = 512 };

struct finding {
    enum verdict verdict;
    char name[DOCTOR_NAME]; // "driver", "gpu0 clocks"
    char found[DOCTOR_TEXT];
    char fix[DOCTOR_TEXT]; // "" when nothing is to be done
};

struct findings {
    int n; // a finding counts once it is whole
    struct finding list[DOCTOR_MAX_FINDINGS];
};

// What stands here, found at the start.
struct host {
    bool container, wsl;
    int pci_gpus;        // NVIDIA GPUs on the PCI bus that no virtual machine was given
    char pci_driver[32]; // of the first one's kernel driver, "" when none is bound
    bool device_nodes;   // /dev/nvidiactl, or WSL's /dev/dxg
};

struct doctor {
    struct findings *findings; // shared with the processes of doctor_guard
    struct host host;
    struct nvml_node *gpus;         // n is 0 where none can be asked
    struct err asked;               // why not, or which part could not be asked
    int gpu;                        // the one that is opened
    char opens[DOCTOR_NAME];        // "gpu0 opens", its finding
    const char *config;             // --config, or NULL
    const struct conf *conf;        // what it says, for the parts of doctor_fleet
    const struct conf_group *group; // the one that is looked at
    const struct conf_model *model; // and its model
};

// fix: NULL with VERDICT_OK.
void doctor_add(struct doctor *d, enum verdict verdict, const char *name, const char *fix, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

// Runs part in a child with a deadline; that it did not end, or died, is a finding of that name.
void doctor_guard(struct doctor *d, const char *name, double seconds, void (*part)(struct doctor *d), const char *fix);

void doctor_look(struct host *host);
void doctor_ask(struct doctor *d);   // fills gpus and asked; first of all
void doctor_host(struct doctor *d);  // processor, memory, limits, WSL2
void doctor_gpus(struct doctor *d);  // the driver, each GPU, the ways between them
void doctor_cuda(struct doctor *d);  // the CUDA backend, its libraries, and whether it opens every GPU
void doctor_fleet(struct doctor *d); // what --config names

void doctor_print_ways(const struct nvml_node *n); // the matrix
json_t *doctor_gpus_json(const struct nvml_node *n);
json_t *doctor_ways_json(const struct nvml_node *n);

// The first line of a file, without its end; "" when it cannot be read.
enum { DOCTOR_LINE = 256 };
const char *doctor_line(char out[DOCTOR_LINE], const char *path_format, ...) __attribute__((format(printf, 2, 3)));
// "139.8 GiB"; "unknown" of a negative number.
enum { DOCTOR_SIZE = 24 };
const char *doctor_size(char out[DOCTOR_SIZE], double bytes);
const char *doctor_s(long n); // the end of a plural: "", "s"

#endif

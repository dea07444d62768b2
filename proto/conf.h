// conf.h: one configuration file, one table, one struct that supervisor, worker and command line share.
//
// INI, read by inih. Every key has a row in conf.c: name, type, bounds, default, what it is for; conf_print_doc prints
// the rows. An unknown section or key, a value out of bounds and a key set twice are errors that name file, line, key
// and what is allowed. Values are plain data after conf_load: nothing here is looked up by name at run time.
#ifndef DITFLEET_CONF_H
#define DITFLEET_CONF_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "proto/err.h"
#include "proto/log.h"

struct conf_list {
    char **items; // (count), and a NULL after the last
    int count;
};

struct conf_model {
    char *name;      // "flux-demo"
    char *version;   // "1"
    char *directory; // diffusers-format directory; absolute, or from the file's directory
};

enum conf_device { CONF_DEVICE_CPU, CONF_DEVICE_CUDA };

#define CONF_MAX_GPUS  64
#define CONF_MAX_NODES 64

// One node of a group that has several, and how many of the group's ranks it has.
struct conf_node {
    char name[65];
    int ranks;
};

// [group NAME]: ranks that make one image together.
struct conf_group {
    char *name;
    int device; // enum conf_device
    char *gpu;  // "0,1": of each rank, as nvidia-smi counts; "": as "0", and on the CPU
    int n_gpus; // the same, taken apart; 0 on the CPU
    short gpus[CONF_MAX_GPUS];
    int precision; // a Ditfleet__V1__Precision of proto/job.h that all its jobs compute in; 0: the models' own
    int exact;     // cuda: 1: pictures have the bits of one GPU, by Ulysses and guidance parallelism
    int ranks;     // processes, 1 to 64, of all nodes
    char *nodes;   // "a:2, b:2", in the order of ranks; "": this node alone
    struct conf_node spans[CONF_MAX_NODES]; // (n_nodes), the same, taken apart
    int n_nodes, my_node;                   // 0: this node alone; else the place of this node among them
    int first_rank, local_ranks;            // of the ranks, those on this node
    int threads;                            // threads a rank computes with; 0: conf_group_threads decides
    int cfg_degree;                         // 0: the planner decides
    int ulysses_degree;                     // 0: the planner decides
    int ring_degree;                        // 0: the planner decides
    int pipefusion_degree, num_pipeline_patch, warmup_steps;
    char *pipefusion_blocks;   // "2,4": of each stage; "": as even as can be
    int data_degree;           // 0: as a job's images can be dealt
    int weights;               // 0: replicated, 1: sharded
    int64_t memory_budget;     // bytes of a GPU that a rank may take; 0: all that is free, and on the CPU
    int64_t slab_bytes;        // each rank's window in the shared-memory region
    struct conf_list model;    // as written: name@version=directory
    struct conf_model *models; // (model.count), the same, taken apart
};

// What becomes of a job about which the moderation endpoint gave no answer.
enum conf_on_error { CONF_ON_ERROR_WAIT, CONF_ON_ERROR_REFUSE, CONF_ON_ERROR_ALLOW };

// Fields named _s are seconds.
struct conf {
    char *path; // the file, absolute
    struct {
        char *url;   // redis:// rediss:// unix://   may hold a password: never logged
        char *queue; // the QUEUE in dit:{QUEUE}:...
    } redis;
    struct {
        char *node;           // default: the host name
        char *address;        // by which other nodes reach this one, IPv4 or IPv6; "": no group spans nodes
        char *state_dir;      // lock file and control.sock
        char *worker_program; // "": ditfleet-worker beside the program that runs
    } fleet;
    struct {
        char *spot_notice; // as supervisor/spot.h has it; "off": nobody is asked
    } node;
    struct {
        double lease_s;
        int max_attempts;   // of a job's own errors, where the job names none; 0: as the queue has it
        double retention_s; // of finished jobs; 0: as the queue has it
        int max_speed;      // GPU-seconds that the fastest group does in a second; 0: as the queue has it
        int max_backlog_s;  // GPU-seconds of jobs that are not final; 0: as the queue has it
    } queue;
    struct {
        struct conf_list allow;      // host:port taken although private or loopback
        struct conf_list file_roots; // absolute directories below which Output.file may lie
        int retries;
        double timeout_s; // one PUT
    } upload;
    struct {
        char *secret_file;      // "": no callbacks
        struct conf_list allow; // host:port called although private or loopback
        int attempts;
        double backoff_min_s, backoff_max_s;
        double timeout_s; // one POST
    } callback;
    struct {
        char *deny_file;        // "": none
        char *url;              // "": nobody is asked; its query may be a secret
        struct conf_list allow; // host:port asked although private or loopback
        double timeout_s;       // one POST
        int on_error;           // enum conf_on_error
    } moderation;
    struct { // a worker whose progress counter stands still this long in the stage is hung
        double load_s, text_s, denoise_s, decode_s, png_s, upload_s;
    } deadline;
    struct {
        double backoff_min_s, backoff_max_s;
        double healthy_s; // up this long: the next failure starts at backoff_min_s again
        double grace_s;   // from DRAIN to SIGKILL
    } restart;
    struct {
        int level; // enum log_level
    } log;
    struct {
        char *listen; // "127.0.0.1:9464", "[::1]:9464"; "": no metrics
    } metrics;
    struct conf_group *groups; // (n_groups)
    int n_groups;
};

// Reads and checks the file. *out is the caller's, freed by conf_free. Errors: ERR_NOT_FOUND, ERR_IO, ERR_INVALID.
int conf_load(const char *path, struct conf **out, struct err *err);
// The same from memory, NUL-terminated; name stands for the file in errors.
int conf_parse(const char *text, const char *name, struct conf **out, struct err *err);
void conf_free(struct conf *c);

// Bytes from a size as the file writes it, "24GiB" or "512M". False: it is none, or above CONF_MAX_BYTES.
#define CONF_MAX_BYTES ((double)(1LL << 40))
bool conf_size(const char *text, int64_t *bytes);
// Whole numbers from least (0 or more) to greatest with commas between them, "2, 4": how many there are, none in "".
// -1: text is something else, or there are more than most.
int conf_numbers(const char *text, long least, long greatest, short *out, int most);

// The table, row by row; section "group" stands for [group NAME]. initial: as a file would write it, "" for none.
struct conf_key {
    const char *section, *name, *doc, *allowed, *initial;
};
typedef void conf_on_key(void *arg, const struct conf_key *key);
void conf_each_key(conf_on_key *on_key, void *arg);
// The table, as a commented example file that conf_load accepts.
void conf_print_doc(FILE *to);

// NULL when there is no such group.
const struct conf_group *conf_group_find(const struct conf *c, const char *name);
// threads, or max(1, cores this process may use / its ranks here) when it is 0.
int conf_group_threads(const struct conf_group *g);
// The name under which a group holds jobs, "node.group", the same over restarts; the node is that of rank 0. Returns
// out.
enum { CONF_WORKER_ID_BYTES = 128 };
const char *conf_worker_id(const struct conf *c, const char *group, char out[CONF_WORKER_ID_BYTES]);
// Every value that a worker of this group reads, as text (malloc, caller frees); two equal texts need no restart.
// Redis and fleet settings are not in it. NULL: out of memory.
char *conf_group_fingerprint(const struct conf *c, const struct conf_group *g);
// What all nodes of a group that spans some have to say alike, as lines "key=value" (malloc, caller frees). NULL: out
// of memory.
char *conf_group_terms(const struct conf_group *g);

#endif

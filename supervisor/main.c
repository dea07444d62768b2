// ditfleet-supervisor: arguments, then supervisor_run.
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "supervisor/supervisor.h"

static void print_help(FILE *to)
{
    fputs("usage: ditfleet-supervisor --config FILE [--check]\n"
          "\n"
          "Keeps this node's groups of workers alive and gives their jobs back when they die.\n"
          "  --config FILE  the configuration, described below\n"
          "  --check        read it, say whether the supervisor could start with it, and leave\n"
          "  --help         this text\n"
          "SIGTERM, SIGINT: drain, then leave; a second one: at once. SIGHUP: read the configuration again.\n"
          "Exit status: 0 after a drain, 1 after a failure, 2 for wrong arguments.\n"
          "\n"
          "The configuration, every key with its default:\n"
          "\n",
          to);
    conf_print_doc(to);
}

static int complain(const struct err *err)
{
    fprintf(stderr, "ditfleet-supervisor: %s\n", err->text);
    return 1;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"config", required_argument, NULL, 'c'},
                                            {"check", no_argument, NULL, 'k'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    const char *path = NULL;
    bool check = false;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == 'c')
            path = optarg;
        else if (o == 'k')
            check = true;
        else if (o == 'h') {
            print_help(stdout);
            return 0;
        } else
            return 2; // getopt_long has said why
    }
    if (!path || optind < argc) {
        fprintf(stderr, "usage: ditfleet-supervisor --config FILE [--check]   (--help says more)\n");
        return 2;
    }
    struct conf *conf = NULL;
    struct err err = {0};
    if (conf_load(path, &conf, &err) != 0)
        return complain(&err);
    if (check) {
        int rc = supervisor_check(conf, &err);
        if (rc == 0)
            printf("%s: good: node %s, %d groups\n", path, conf->fleet.node, conf->n_groups);
        conf_free(conf);
        return rc == 0 ? 0 : complain(&err);
    }
    return supervisor_run(conf, &err) == 0 ? 0 : complain(&err);
}

/* A stand-in for libnvidia-ml.so.1: what the exporter calls, answered from a control file (NVML_STUB_FILE).

   The file has a line `key[@gpu]=value` each; it is read again whenever it changes, so a test changes a running process.
   `error.<function>[@gpu]=<code>` and `error.*@<gpu>=<code>` inject errors, `sleep_ms.<function>` delays.
   Written from the public NVML API reference; struct layouts as there. With -DOLD: a library of some years ago. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15 };
enum { ENTRIES = 2048, GPUS = 64, NAMES = 64, THREADS = 16, ROWS = 4096 };

typedef struct { char key[96]; int gpu; char value[1024]; } entry;
typedef struct { long gpu, gi, ci; } device; /* gi -1: the whole GPU */
typedef struct { uint32_t field, scope; int64_t at, latency_us; uint32_t type; int code; union { double d; uint32_t ui; unsigned long ul; uint64_t ull; int64_t sll; int si; uint16_t us; } value; } field_value;
typedef struct { uint32_t pid; uint64_t memory; uint32_t gi, ci; } process;
typedef struct { uint32_t pid; uint64_t at_us; uint32_t sm, memory, enc, dec; } use;
typedef struct { uint32_t metric; int code; double value; char *name, *unit, *kind; } metric;
typedef struct { uint32_t version, count; void *first, *second; metric metrics[]; } metrics_get;
typedef struct { double at_s; int gpu, gi; } sample;
typedef struct { int seen[GPUS], registered[GPUS]; uint64_t types[GPUS]; } event_set;
typedef struct { void *device; uint64_t type, data; uint32_t gi, ci; } event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static entry entries[ENTRIES];
static int entry_count, opened, present[GPUS];
static struct stat known;
static struct { char name[64]; long calls; } counted[NAMES];
static struct { long id, calls; } threads[THREADS];
static double loaded_s;

static double now_s(clockid_t clock) { struct timespec t; clock_gettime(clock, &t); return t.tv_sec + t.tv_nsec * 1e-9; }

static void refresh(void) {
    const char *path = getenv("NVML_STUB_FILE");
    struct stat found;
    if (!path || stat(path, &found)) { entry_count = 0; memset(&known, 0, sizeof known); return; }
    if (found.st_ino == known.st_ino && found.st_dev == known.st_dev && found.st_size == known.st_size &&
        !memcmp(&found.st_mtim, &known.st_mtim, sizeof found.st_mtim)) return;
    known = found;
    if (loaded_s == 0) loaded_s = now_s(CLOCK_MONOTONIC);
    FILE *file = fopen(path, "r");
    char line[2048];
    for (entry_count = 0; file && entry_count < ENTRIES && fgets(line, sizeof line, file);) {
        char *value = strchr(line, '=');
        if (!value) continue;
        *value++ = 0;
        value[strcspn(value, "\n")] = 0;
        entry *one = &entries[entry_count++];
        char *at = strrchr(line, '@');
        one->gpu = at ? atoi(at + 1) : -1;
        if (at) *at = 0;
        snprintf(one->key, sizeof one->key, "%.95s", line);
        snprintf(one->value, sizeof one->value, "%.1023s", value);
    }
    if (file) fclose(file);
}

static const char *text(const char *key, int gpu) {
    const char *all = NULL;
    for (int i = 0; i < entry_count; i++)
        if ((entries[i].gpu == gpu || entries[i].gpu == -1) && !strcmp(entries[i].key, key)) {
            if (entries[i].gpu == gpu) return entries[i].value;
            all = entries[i].value;
        }
    return all;
}

/* `base[+per_second][%modulus]` */
static double number(const char *key, int gpu, double otherwise) {
    const char *found = text(key, gpu);
    if (!found) return otherwise;
    char *rest;
    double value = strtod(found, &rest);
    if (*rest == '+') value += strtod(rest + 1, &rest) * (now_s(CLOCK_MONOTONIC) - loaded_s);
    if (*rest == '%') { double modulus = strtod(rest + 1, &rest); value -= modulus * (long)(value / modulus); }
    return value;
}

static int enter(const char *function, const device *of) {
    int gpu = of ? of->gpu : -1, i;
    char key[96];
    pthread_mutex_lock(&lock);
    refresh();
    for (i = 0; i < NAMES - 1 && counted[i].name[0] && strcmp(counted[i].name, function); i++) ;
    snprintf(counted[i].name, sizeof counted[i].name, "%s", function);
    counted[i].calls++;
    long id = syscall(SYS_gettid);
    for (i = 0; i < THREADS - 1 && threads[i].id && threads[i].id != id; i++) ;
    threads[i].id = id;
    threads[i].calls++;
    snprintf(key, sizeof key, "sleep_ms.%s", function);
    int wait_ms = number(key, gpu, 0);
    snprintf(key, sizeof key, "error.%s", function);
    int code = number(key, gpu, 0);
    if (!code && gpu >= 0) code = number("error.*", gpu, 0);
    if (!code && !opened && strcmp(function, "nvmlInitWithFlags") && strcmp(function, "nvmlInit_v2")) code = UNINITIALIZED;
    if (!code && gpu >= 0 && !present[gpu]) code = LOST;
    pthread_mutex_unlock(&lock);
    while (wait_ms-- > 0) {
        usleep(1000);
        if (wait_ms % 20 == 0) { /* a hang ends when the file no longer asks for it */
            pthread_mutex_lock(&lock);
            refresh();
            snprintf(key, sizeof key, "sleep_ms.%s", function);
            if (!number(key, gpu, 0)) wait_ms = 0;
            pthread_mutex_unlock(&lock);
        }
    }
    return code;
}

#define ENTER(of) int code = enter(__func__, of); if (code) return code

static device devices[GPUS][17];
static device *handle(long gpu, long gi) { devices[gpu][gi + 1] = (device){gpu, gi, gi < 0 ? -1 : 0}; return &devices[gpu][gi + 1]; }
static int of_mig(const device *d) { return d->gi >= 0; }
static int mig_on(const device *d) { return text("mig", d->gpu) != NULL; }

/* For tests in this process. */
long stub_calls(const char *function) { for (int i = 0; i < NAMES; i++) if (!strcmp(counted[i].name, function)) return counted[i].calls; return 0; }
long stub_calls_of_thread(long id) { for (int i = 0; i < THREADS; i++) if (threads[i].id == id) return threads[i].calls; return 0; }
void stub_reset(void) { opened = 0; loaded_s = 0; memset(counted, 0, sizeof counted); memset(threads, 0, sizeof threads); memset(&known, 0, sizeof known); }

int nvmlInitWithFlags(unsigned flags) {
    ENTER(NULL);
    if (!opened++) for (int i = 0; i < GPUS; i++) present[i] = i < number("gpus", -1, 1) && !number("absent", i, 0);
    return OK;
}
int nvmlShutdown(void) { ENTER(NULL); opened--; return OK; }
const char *nvmlErrorString(int code) { static char said[32]; snprintf(said, sizeof said, "stub error %d", code); return said; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { ENTER(NULL); snprintf(out, size, "%s", text("driver", -1) ? text("driver", -1) : "580.00"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *out) { ENTER(NULL); *out = 0; for (int i = 0; i < GPUS; i++) *out += present[i]; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) {
    for (int i = 0; i < GPUS; i++)
        if (present[i] && index-- == 0) { *out = handle(i, -1); ENTER(*out); return OK; }
    return INVALID;
}
static void uuid_of(const device *d, char *out, unsigned size) {
    const char *given = text("uuid", d->gpu);
    if (of_mig(d)) snprintf(out, size, "MIG-%08ld-%ld", d->gpu, d->gi);
    else if (given) snprintf(out, size, "%s", given);
    else snprintf(out, size, "GPU-%08ld", d->gpu);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) {
    char own[96];
    for (int i = 0; i < GPUS; i++)
        if (present[i]) {
            *out = handle(i, -1);
            uuid_of(*out, own, sizeof own);
            if (!strcmp(own, uuid)) { ENTER(*out); return OK; }
        }
    ENTER(NULL);
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(device *d, char *out, unsigned size) { ENTER(d); uuid_of(d, out, size); return OK; }
int nvmlDeviceGetName(device *d, char *out, unsigned size) {
    ENTER(d);
    const char *name = text("name", d->gpu) ? text("name", d->gpu) : "NVIDIA H100 80GB HBM3";
    if (!of_mig(d)) { snprintf(out, size, "%s", name); return OK; }
    char *all = strdup(text("mig", d->gpu)), *state, *profile = "?";
    for (char *one = strtok_r(all, ",", &state); one; one = strtok_r(NULL, ",", &state))
        if (atoi(one) == d->gi && strchr(one, ':')) profile = strchr(one, ':') + 1;
    snprintf(out, size, "%s MIG %s", name, profile);
    free(all);
    return OK;
}
int nvmlDeviceGetUtilizationRates(device *d, unsigned *out) {
    ENTER(d);
    if (mig_on(d)) return NOT_SUPPORTED;
    out[0] = number("util", d->gpu, 40 + d->gpu);
    out[1] = number("util_mem", d->gpu, 11);
    return OK;
}
static void memory_of(const device *d, double *total, double *used) {
    *total = of_mig(d) ? 10.0 * (1 << 30) : number("mem_total", d->gpu, 80.0 * (1 << 30));
    *used = of_mig(d) ? (double)d->gi * (1 << 30) : number("mem_used", d->gpu, 70.0 * (1 << 30));
}
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } memory_v2;
typedef struct { uint64_t total, free, used; } memory_v1;
#ifndef OLD
int nvmlDeviceGetMemoryInfo_v2(device *d, memory_v2 *out) {
    ENTER(d);
    if (out->version != (sizeof *out | 2 << 24)) return 25;
    double total, used;
    memory_of(d, &total, &used);
    out->total = total; out->used = used; out->reserved = 512 << 20; out->free = total - used - out->reserved;
    return OK;
}
int nvmlDeviceGetTemperatureV(device *d, unsigned *out) { ENTER(d); if (of_mig(d)) return NOT_SUPPORTED; out[2] = (int)number("temp", d->gpu, 60); return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *out) { ENTER(d); *out = number("reasons", d->gpu, 4); return OK; }
#endif
int nvmlDeviceGetMemoryInfo(device *d, memory_v1 *out) {
    ENTER(d);
    double total, used;
    memory_of(d, &total, &used);
    out->total = total; out->used = used + (512 << 20); out->free = total - out->used;
    return OK;
}
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *out) { ENTER(d); *out = number("temp", d->gpu, 60); return OK; }
int nvmlDeviceGetCurrentClocksThrottleReasons(device *d, unsigned long long *out) { ENTER(d); *out = number("reasons", d->gpu, 4); return OK; }
int nvmlDeviceGetClockInfo(device *d, unsigned clock, unsigned *out) { ENTER(d); *out = clock == 2 ? number("mem_clock", d->gpu, 2619) : number("sm_clock", d->gpu, 1755); return OK; }
int nvmlDeviceGetMaxClockInfo(device *d, unsigned clock, unsigned *out) { ENTER(d); *out = number("sm_clock_max", d->gpu, 1980); return OK; }
int nvmlDeviceGetPowerUsage(device *d, unsigned *out) { ENTER(d); *out = number("power_mw", d->gpu, 300000); return OK; }
int nvmlDeviceGetEnforcedPowerLimit(device *d, unsigned *out) { ENTER(d); *out = number("limit_mw", d->gpu, 700000); return OK; }
int nvmlDeviceGetTotalEnergyConsumption(device *d, unsigned long long *out) { ENTER(d); *out = number("energy_mj", d->gpu, 7000000); return OK; }

int nvmlDeviceGetFieldValues(device *d, int count, field_value *out) {
    ENTER(d);
    char key[32];
    for (int i = 0; i < count; i++) {
        field_value *one = &out[i];
        snprintf(key, sizeof key, "fielderror.%u", one->field);
        one->latency_us = number("latency_us", d->gpu, 3);
        one->at = (int64_t)(now_s(CLOCK_REALTIME) * 1e6);
        if ((one->code = number(key, d->gpu, 0))) continue;
        snprintf(key, sizeof key, "field.%u", one->field);
        if (!text(key, d->gpu)) { one->code = NOT_SUPPORTED; continue; }
        double value = number(key, d->gpu, 0);
        if ((one->field == 138 || one->field == 139) && one->scope != 0xFFFFFFFF) { one->code = INVALID; continue; }
        snprintf(key, sizeof key, "fieldtype.%u", one->field);
        switch (one->type = number(key, d->gpu, 3)) {
            case 0: one->value.d = value; break;
            case 1: one->value.ui = value; break;
            case 2: one->value.ul = value; break;
            case 3: one->value.ull = value; break;
            case 4: one->value.sll = value; break;
            case 5: one->value.si = value; break;
            case 6: one->value.us = value; break;
        }
    }
    return OK;
}

/* -- MIG: `mig@<gpu>=1:1g.10gb,2:2g.20gb` -- */
int nvmlDeviceGetMigMode(device *d, unsigned *current, unsigned *pending) { ENTER(d); if (number("mig_never", d->gpu, 0)) return NOT_SUPPORTED; *current = *pending = mig_on(d); return OK; }
int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *out) { ENTER(d); *out = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned index, device **out) {
    ENTER(d);
    const char *found = text("mig", d->gpu);
    if (!found) return NOT_FOUND;
    char *all = strdup(found), *state;
    int gi = -1;
    for (char *one = strtok_r(all, ",", &state); one; one = strtok_r(NULL, ",", &state))
        if (index-- == 0) gi = atoi(one);
    free(all);
    if (gi < 0) return NOT_FOUND;
    *out = handle(d->gpu, gi);
    return OK;
}
int nvmlDeviceGetGpuInstanceId(device *d, unsigned *out) { ENTER(d); if (!of_mig(d)) return INVALID; *out = d->gi; return OK; }

/* -- processes: `processes@<gpu>=pid:bytes[:gi],...`, bytes -1: not available -- */
static int list(const char *key, const device *d, unsigned *count, process *out) {
    char *all = strdup(text(key, d->gpu) ? text(key, d->gpu) : ""), *state;
    unsigned found = 0, room = out ? *count : 0;
    for (char *one = strtok_r(all, ",", &state); one; one = strtok_r(NULL, ",", &state)) {
        long pid, bytes, gi = -1;
        sscanf(one, "%ld:%ld:%ld", &pid, &bytes, &gi);
        if (of_mig(d) && gi != d->gi) continue;
        if (found < room) out[found] = (process){pid, bytes, gi, gi < 0 ? -1 : 0};
        found++;
    }
    free(all);
    *count = found;
    return found > room ? TOO_SMALL : OK;
}
#ifndef OLD
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *out) { ENTER(d); return list("processes", d, count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(device *d, unsigned *count, process *out) { ENTER(d); return list("graphics", d, count, out); }
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device *d, unsigned *count, process *out) { ENTER(d); return list("mps", d, count, out); }
#endif
int nvmlDeviceGetComputeRunningProcesses_v2(device *d, unsigned *count, process *out) { ENTER(d); return list("processes", d, count, out); }

/* `utilisation@<gpu>=pid:sm:mem:age_s` (age below 0: a time far in the future), only what is newer than asked for
   unless the age has an `!` (a driver that gives stale samples). */
int nvmlDeviceGetProcessUtilization(device *d, use *out, unsigned *count, unsigned long long since_us) {
    ENTER(d);
    if (mig_on(d)) return NOT_SUPPORTED;
    char *all = strdup(text("utilisation", d->gpu) ? text("utilisation", d->gpu) : ""), *state;
    unsigned found = 0, room = out ? *count : 0;
    for (char *one = strtok_r(all, ",", &state); one; one = strtok_r(NULL, ",", &state)) {
        long pid, sm, memory;
        double age_s = 0;
        sscanf(one, "%ld:%ld:%ld:%lf", &pid, &sm, &memory, &age_s);
        uint64_t at_us = (now_s(CLOCK_REALTIME) - age_s) * 1e6;
        if (at_us <= since_us && !strchr(one, '!')) continue;
        if (found < room) out[found] = (use){pid, at_us, sm, memory, 0, 0};
        found++;
    }
    free(all);
    *count = found;
    return !found ? NOT_FOUND : found > room ? TOO_SMALL : OK;
}

#ifndef OLD
/* -- GPM: `gpm.<metric>=percent`; of a MIG instance: plus its id -- */
int nvmlGpmQueryDeviceSupport(device *d, unsigned *out) { ENTER(d); out[1] = !number("gpm_never", d->gpu, 0); return OK; }
int nvmlGpmSampleAlloc(sample **out) { ENTER(NULL); *out = calloc(1, sizeof **out); return OK; }
int nvmlGpmSampleFree(sample *one) { ENTER(NULL); free(one); return OK; }
static int take(const device *d, int gi, sample *out) { *out = (sample){now_s(CLOCK_MONOTONIC), d->gpu, gi}; return OK; }
int nvmlGpmSampleGet(device *d, sample *out) { ENTER(d); return take(d, -1, out); }
int nvmlGpmMigSampleGet(device *d, unsigned gi, sample *out) { ENTER(d); if (!mig_on(d)) return INVALID; return take(d, gi, out); }
int nvmlGpmMetricsGet(metrics_get *out) {
    ENTER(NULL);
    sample *a = out->first, *b = out->second;
    if (out->version != 1 || a->gpu != b->gpu || a->gi != b->gi || b->at_s - a->at_s < 0.1) return INVALID;
    char key[32];
    for (unsigned i = 0; i < out->count; i++) {
        metric *one = &out->metrics[i];
        snprintf(key, sizeof key, "gpm.%u", one->metric);
        one->code = text(key, a->gpu) ? OK : NOT_SUPPORTED;
        one->value = number(key, a->gpu, 0) + (a->gi > 0 ? a->gi : 0);
    }
    return OK;
}
#endif

/* -- events: `event@<gpu>=<number>:<type>:<data>`; another number is another event -- */
int nvmlDeviceGetSupportedEventTypes(device *d, unsigned long long *out) { ENTER(d); *out = number("event_types", d->gpu, 0x8); return OK; }
int nvmlEventSetCreate(event_set **out) { ENTER(NULL); *out = calloc(1, sizeof **out); return OK; }
int nvmlEventSetFree(event_set *set) { ENTER(NULL); free(set); return OK; }
static int event_of(int gpu, uint64_t *type, uint64_t *data) {
    long serial = 0; unsigned long long t = 0, v = 0;
    if (text("event", gpu)) sscanf(text("event", gpu), "%ld:%llu:%llu", &serial, &t, &v);
    *type = t; *data = v;
    return serial;
}
int nvmlDeviceRegisterEvents(device *d, unsigned long long types, event_set *set) {
    ENTER(d);
    uint64_t type, data;
    if (types & ~(unsigned long long)number("event_types", d->gpu, 0x8)) return NOT_SUPPORTED;
    set->registered[d->gpu] = 1;
    set->types[d->gpu] = types;
    set->seen[d->gpu] = event_of(d->gpu, &type, &data);
    return OK;
}
int nvmlEventSetWait_v2(event_set *set, event *out, unsigned timeout_ms) {
    ENTER(NULL);
    for (unsigned waited = 0;; waited += 100) {
        pthread_mutex_lock(&lock);
        refresh();
        for (int i = 0; i < GPUS; i++) {
            uint64_t type, data;
            int serial = set->registered[i] ? event_of(i, &type, &data) : 0;
            if (set->registered[i] && serial != set->seen[i] && (type & set->types[i])) {
                set->seen[i] = serial;
                *out = (event){handle(i, -1), type, data, -1, -1};
                pthread_mutex_unlock(&lock);
                return OK;
            }
        }
        pthread_mutex_unlock(&lock);
        if (waited >= timeout_ms) return TIMEOUT;
        usleep(100000);
    }
}

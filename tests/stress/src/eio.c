/* A disk that now and then can't be read.
 *
 * Preloaded into the server, this fails reads of files with "/faulty" in their path. How often
 * is said by a file of three numbers that is mapped before the server gives up its rights:
 * every so many'th read fails (0: none), how many there were, and how many of them failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

struct control {
	uint64_t every, reads, failed;
};

static struct control *control;

/* Which descriptors are of faulty files. */
static unsigned char faulty[1 << 16];
#define KNOWN(fd) ((fd) >= 0 && (size_t)(fd) < sizeof faulty)

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("HEXZ_STRESS_EIO");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	if (fd < 0)
		abort();
	void *page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		abort();
	control = page;
	close(fd);
}

static int opened(int fd, const char *path)
{
	if (KNOWN(fd))
		faulty[fd] = strstr(path, "/faulty") != NULL;
	return fd;
}

#define OPEN(name)                                                    \
	int name(const char *path, int flags, ...)                    \
	{                                                             \
		va_list arguments;                                    \
		va_start(arguments, flags);                           \
		mode_t mode = va_arg(arguments, mode_t);              \
		va_end(arguments);                                    \
		return opened(REAL(name)(path, flags, mode), path);   \
	}

OPEN(open)
OPEN(open64)

int close(int fd)
{
	if (KNOWN(fd))
		faulty[fd] = 0;
	return REAL(close)(fd);
}

static int fails(int fd)
{
	if (!control || !KNOWN(fd) || !faulty[fd])
		return 0;
	uint64_t count = __atomic_add_fetch(&control->reads, 1, __ATOMIC_RELAXED);
	uint64_t every = __atomic_load_n(&control->every, __ATOMIC_RELAXED);
	if (!every || count % every)
		return 0;
	__atomic_add_fetch(&control->failed, 1, __ATOMIC_RELAXED);
	errno = EIO;
	return 1;
}

#define PREAD(name)                                                                  \
	ssize_t name(int fd, void *buffer, size_t count, off_t offset)               \
	{                                                                            \
		return fails(fd) ? -1 : REAL(name)(fd, buffer, count, offset);       \
	}

PREAD(pread)
PREAD(pread64)
